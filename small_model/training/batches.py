"""Batches made ahead of time in other processes, in the order of the steps."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from small_model.training.curriculum import MOST_SEQUENCES, Curriculum
from small_model.training.data import Batch, Encoder, Stage, make_batch

_encoder: Encoder | None = None


def _start_worker(tokenizer: Path) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(tokenizer)


def _start_process(tokenizer: Path) -> None:
    # Ctrl-C reaches the whole group; the training itself decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _start_worker(tokenizer)


def _work(seed: int, step: int, stage: Stage, sequences: int) -> Batch:
    assert _encoder is not None
    return make_batch(_encoder, seed, step, stage, sequences)


class BatchSource:
    """Gives the batch of a step; which stage it is from is the curriculum's decision."""

    def __init__(
        self, seed: int, batch_tokens: int, pool: ProcessPoolExecutor | None, ahead: int
    ) -> None:
        self._seed, self._batch_tokens = seed, batch_tokens
        self._pool, self._ahead = pool, ahead
        self._pending: dict[int, Future[Batch]] = {}
        self._stage = -1

    def batch(self, curriculum: Curriculum, step: int) -> Batch:
        """The batch of a step; those of the next steps are begun."""
        if self._pool is None:
            return _work(*self._arguments(curriculum, step))
        if curriculum.stage != self._stage:
            # Begun for the stage before: other batches.
            for stale in self._pending.values():
                stale.cancel()
            self._pending.clear()
            self._stage = curriculum.stage
        first = max(self._pending, default=step - 1) + 1
        for later in range(first, step + self._ahead):
            arguments = self._arguments(curriculum, later)
            self._pending[later] = self._pool.submit(_work, *arguments)
        return self._pending.pop(step).result()

    def _arguments(self, curriculum: Curriculum, step: int) -> tuple[int, int, Stage, int]:
        stage = curriculum.stages[curriculum.stage_of(self._seed, step)]
        tokens = stage.batch_tokens or self._batch_tokens
        sequences = min(MOST_SEQUENCES, max(1, tokens // stage.length))
        return self._seed, step, stage, sequences


@contextmanager
def batch_source(
    seed: int, batch_tokens: int, tokenizer: Path, workers: int
) -> Iterator[BatchSource]:
    """A source with so many worker processes; none: batches are made in this one."""
    if not workers:
        _start_worker(tokenizer)
        yield BatchSource(seed, batch_tokens, None, 0)
        return
    # Not forked: this process may have threads and a CUDA context.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_process, (tokenizer,))
    try:
        yield BatchSource(seed, batch_tokens, pool, 2 * workers)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
