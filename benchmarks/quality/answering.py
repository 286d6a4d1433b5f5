"""Asks questions of an engine under one setting and watches when each token is decided."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.quality.cases import Case
from benchmarks.quality.settings import Setting
from benchmarks.quality.variants import install
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.request_state import Attention, RequestState


@dataclass(frozen=True, slots=True)
class Asking:
    """How every question is asked.

    Attributes:
        canvas: tokens of every answer; None: as each case says.
        alg: how tokens are chosen in a step; None: as the server does.
    """

    canvas: int | None = None
    alg: str | None = None

    def extra_args(self, case: Case, setting: Setting) -> dict[str, Any]:
        """Parameters of a request."""
        args = setting.extra_args(self.canvas_of(case))
        return args if self.alg is None else {**args, "diffusion_alg": self.alg}

    def canvas_of(self, case: Case) -> int:
        return self.canvas or case.canvas


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back.

    Attributes:
        decided: the pass, from 0, in which each token of the answer was decided.
        steps: passes taken; a request ends early once nothing visible is left to decide.
        density: share of the key blocks that its patterns keep; None where none was built.
        sparse_tokens: tokens of the answer decided in passes with sparse attention.
        rows: that all passes together computed.
        seconds: of the whole batch that it was asked in, divided by its requests.
    """

    text: str
    decided: list[int]
    steps: int
    density: float | None
    sparse_tokens: int = 0
    rows: int = 0
    seconds: float = 0.0


def answer_cases(
    llm: Any, cases: Sequence[Case], setting: Setting, asking: Asking
) -> list[Answered]:
    """Ask all questions under one setting.

    Args:
        llm: an engine in this process, on one device, with `attention_backend="sparsed"`.
    """
    from vllm import SamplingParams

    llm.collective_rpc(install, args=(setting,))
    engine = llm.llm_engine
    for number, case in enumerate(cases):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=asking.canvas_of(case),
            extra_args=asking.extra_args(case, setting),
        )
        engine.add_request(f"{number}-", {"prompt_token_ids": case.prompt}, params)
    longest = max(asking.canvas_of(case) for case in cases)
    watch = _Watch(llm.collective_rpc(_runner)[0], len(cases), longest)
    began = time.perf_counter()
    answers: dict[int, tuple[str, int]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        watch.look()
        for output in outputs:
            if output.finished:
                answer = output.outputs[0]
                answers[_number(output.request_id)] = (answer.text, len(answer.token_ids))
    seconds = (time.perf_counter() - began) / len(cases)
    densities = watch.densities()
    answered = []
    for number in range(len(cases)):
        text, length = answers[number]
        taken = int(watch.steps[number])
        decided, sparse = watch.decided[number, :length], watch.sparse[number, :length]
        # A mask that was never filled in counts for the last step.
        at = np.where(decided < 0, taken - 1, decided).tolist()
        # From step 0 on another packer attends sparsely, of which the requests do not know.
        in_sparse = length if setting.schedule == "from_start" else int(sparse.sum())
        rows = int(watch.rows[number])
        density = densities.get(number)
        answered.append(Answered(text, at, taken, density, in_sparse, rows, seconds))
    return answered


def _runner(worker: Any) -> DenoisingModelRunner:
    """In a worker of this process: the model runner itself."""
    runner: DenoisingModelRunner = worker.model_runner
    return runner


def _number(request_id: str) -> int:
    """Of the case; vLLM may add a suffix of its own."""
    return int(request_id.split("-")[0])


@dataclass(slots=True)
class _Watch:
    """Looks at the requests of a model runner after every engine step.

    Attributes:
        decided: int64 [cases, canvas], pass of each token; -1: not decided yet.
        sparse: bool [cases, canvas], whether it was a sparse one.
        steps: int64 [cases], passes taken.
        rows: int64 [cases], computed in them.
    """

    runner: DenoisingModelRunner
    cases: int
    canvas: int
    decided: npt.NDArray[np.int64] = field(init=False)
    sparse: npt.NDArray[np.bool_] = field(init=False)
    steps: npt.NDArray[np.int64] = field(init=False)
    rows: npt.NDArray[np.int64] = field(init=False)
    # Of the coming pass of each request: its rows, and whether it is a sparse one. The first pass
    # computes all rows and is a dense one.
    _coming: dict[int, tuple[int, bool]] = field(default_factory=dict, init=False)
    _kept: dict[int, torch.Tensor] = field(default_factory=dict, init=False)
    _candidates: dict[int, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.decided = np.full((self.cases, self.canvas), -1, dtype=np.int64)
        self.sparse = np.zeros((self.cases, self.canvas), dtype=np.bool_)
        self.steps = np.zeros(self.cases, dtype=np.int64)
        self.rows = np.zeros(self.cases, dtype=np.int64)

    def look(self) -> None:
        """One row of numbers per request: nothing is read from the device."""
        running: Mapping[str, RequestState] = self.runner.requests
        for request_id, state in running.items():
            number = _number(request_id)
            canvas = state.tokens[state.plan.prompt_len :]
            all_rows = state.plan.num_sequences * state.plan.seq_len
            rows, is_sparse = self._coming.get(number, (all_rows, False))
            decided = self.decided[number, : len(canvas)]
            fresh = (decided < 0) & (canvas != state.mask_token_id)
            decided[fresh] = state.num_passes - 1
            self.sparse[number, : len(canvas)][fresh] = is_sparse
            self.rows[number] += rows * (state.num_passes - self.steps[number])
            self.steps[number] = state.num_passes
            # Where keys and values are kept a pass may compute a part of the rows.
            start, end = state.rows
            coming = state.plan.num_sequences * (end - start)
            self._coming[number] = coming, state.attention == Attention.SPARSE
            if state.pattern_rows and number not in self._kept:
                self._keep(number, state)

    def _keep(self, number: int, state: RequestState) -> None:
        """Count the blocks of new patterns; the rows are another request's when this one ends."""
        store = self.runner.store
        assert store is not None
        slots = np.concatenate(state.pattern_rows).astype(np.int64)
        rows = store.counts[:, to_device(slots, self.runner.device)]
        self._kept[number] = rows.sum(dtype=torch.int64)
        self._candidates[number] = rows.numel() * len(state.pattern_rows[0])

    def densities(self) -> dict[int, float]:
        """By case; waits for the device."""
        if not self._kept:
            return {}
        kept = torch.stack(list(self._kept.values())).tolist()
        return {
            number: count / self._candidates[number]
            for number, count in zip(self._kept, kept, strict=True)
        }
