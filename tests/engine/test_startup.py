"""The memory check at start."""

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.engine.inspection import runner_of
from vllm_sparsed.attention import pattern_store
from vllm_sparsed.attention.metadata import SparsedMetadata
from vllm_sparsed.worker import startup
from vllm_sparsed.worker.memory_errors import StartupError
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.startup import measure_memory

lack_of_memory = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
    ids=["device", "python", "host"],
)


@lack_of_memory
def test_a_batch_that_does_not_fit_says_what_to_change(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    runner = runner_of(engine("llada-mha"))

    def fail(*args: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(runner, "run_model", fail)
    with pytest.raises(StartupError, match=r"A full batch .*max-model-len.*max-num-batched-tokens"):
        measure_memory(runner, None)


@lack_of_memory
def test_a_pattern_store_that_does_not_fit_says_what_to_change(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    runner = runner_of(engine("llada-mha"))

    def fail(*args: object, **kwargs: object) -> torch.Tensor:
        raise error

    second = DenoisingModelRunner(runner.vllm_config, runner.device)
    monkeypatch.setattr(pattern_store.torch, "zeros", fail)
    with pytest.raises(StartupError, match=r"pattern store of 0\.\d+ GiB .*sparsed\.block_size"):
        second.initialize_kv_cache(None)


def test_other_errors_are_not_taken_for_lack_of_memory(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(engine("llada-mha"))

    def fail(*args: object) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(runner, "run_model", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measure_memory(runner, None)


def test_the_whole_batch_is_run(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token of max_num_batched_tokens, in sequences no longer than the context."""
    runner = runner_of(engine("llada-mha"))
    run_model = runner.run_model
    assert runner.store is not None
    free = runner.store.num_free_rows
    lengths: list[int] = []

    def record(token_ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        assert len(token_ids) == runner.settings.max_batch_tokens
        lengths.extend(torch.diff((positions == 0).nonzero().flatten()).tolist())
        return run_model(token_ids, positions, attention)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "run_model", record)
    measure_memory(runner, None)
    assert lengths
    assert max(lengths) == runner.settings.max_model_len
    assert runner.store.num_free_rows == free


@pytest.mark.parametrize("max_canvas", [None, 96])
def test_the_measured_batch_builds_the_longest_pattern(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch, max_canvas: int | None
) -> None:
    """Its maps and its store rows are those of a request; the rows are free again afterwards."""
    runner = runner_of(engine("llada-mha"))
    assert runner.store is not None
    server = replace(runner.settings.server, sparsed_max_canvas=max_canvas)
    monkeypatch.setattr(runner, "settings", replace(runner.settings, server=server))
    run_model = runner.run_model
    batches: list[SparsedMetadata] = []

    def record(
        token_ids: torch.Tensor, positions: torch.Tensor, attention: dict[str, SparsedMetadata]
    ) -> torch.Tensor:
        batches.append(next(iter(attention.values())))
        return run_model(token_ids, positions, attention)

    monkeypatch.setattr(runner, "run_model", record)
    runner.store.counts.zero_()
    free = runner.store.num_free_rows
    measure_memory(runner, None)
    (batch,) = batches
    (build,) = batch.builds
    longest = runner.settings.max_model_len
    assert (build.end, build.end - build.start) == (runner.settings.max_batch_tokens, longest)
    assert build.canvas_len == (max_canvas or longest)
    assert (build.block_size, build.select) == (16, 0.5)
    counts = runner.store.counts[:, build.pattern_rows.long()]
    assert counts.shape[1] == longest // 16
    assert counts.min() > 0, "a pattern of every layer, row and head was built"
    assert runner.store.num_free_rows == free


def test_guided_halves_in_turn_are_counted(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured pass runs beside the hidden states of both halves of a full batch."""
    runner = runner_of(engine("llada-mha"))
    total, width = runner.settings.max_batch_tokens, runner.model_config.get_hidden_size()
    run = startup._run
    beside: list[bool] = []

    def look(*arguments: Any) -> torch.Tensor:
        tensors = (x for x in gc.get_objects() if type(x) is torch.Tensor)
        beside.append(any(x.shape == (2 * total, width) for x in tensors))
        return run(*arguments)

    monkeypatch.setattr(startup, "_run", look)
    measure_memory(runner, None)
    assert beside == [True]


def test_the_largest_pass_is_recorded(
    engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is part of the measurement, and 32 graphs' own; not what others take meanwhile."""
    runner = runner_of(engine("llada-mha"))
    recorded: list[int] = []
    # Before and after each graph: held by the allocator, taken beside it.
    graphs = [(50, 1000), (75, 3000)], [(75, 3000), (77, 3070)], [(77, 3070), (77, 9999)]
    taken = iter([*chain(*graphs), (77, 9999), (77, 10079)])
    monkeypatch.setattr(startup, "_device_bytes", lambda: next(taken))

    class Rerun:
        def __init__(self, run: Callable[[], torch.Tensor]) -> None:
            recorded.append(len(run()))

        def replay(self) -> torch.Tensor:
            raise AssertionError

    runner.record_passes(700, Rerun)
    try:
        assert runner.graphs is not None
        assert startup._record_largest_pass(runner, runner.graphs) == 27 + 32 * 70
        assert recorded == [700, 699, 698, 697]
        assert len(runner.graphs) == 4
    finally:
        runner.graphs = None
