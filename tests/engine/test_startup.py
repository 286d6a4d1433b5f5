"""The memory check at start."""

from collections.abc import Callable

import pytest
import torch
from vllm import LLM

from tests.engine.inspection import runner_of
from vllm_sparsed.attention import pattern_store
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.startup import StartupError, measure_memory

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
    lengths: list[int] = []

    def record(token_ids: torch.Tensor, positions: torch.Tensor, attention: object) -> torch.Tensor:
        assert len(token_ids) == runner.settings.max_batch_tokens
        lengths.extend(torch.diff((positions == 0).nonzero().flatten()).tolist())
        return run_model(token_ids, positions, attention)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "run_model", record)
    measure_memory(runner, None)
    assert lengths
    assert max(lengths) == runner.settings.max_model_len
