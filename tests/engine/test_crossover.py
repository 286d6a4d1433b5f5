"""Requests that sparse attention would not make faster run dense, whatever runs beside them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability

from tests.engine.golden_cases import GOLDEN
from tests.engine.inspection import runner_of
from vllm_sparsed.config import engine as engine_config
from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.planning.crossover import AttentionCosts, Crossover, KernelCost
from vllm_sparsed.planning.kernel_costs import attention_costs

# Dense attention takes 3 microseconds at 100 tokens and 67 at 500, sparse attention always 20.
FAST = KernelCost(0.0, 0.0, 1e6)
COSTS = AttentionCosts(
    dense=KernelCost(0.0, 0.0, 1.0),
    sparse=dict.fromkeys((16, 32, 64, 128), KernelCost(20.0, 0.0, 1e6)),
    build=dict.fromkeys((16, 32, 64, 128), FAST),
)
BLOCK_SIZE = 16


@pytest.mark.parametrize("capability", [None, (9, 0), (8, 6)], ids=["cpu", "sm_90", "sm_86"])
def test_all_processes_predict_by_the_capability_found_at_start(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None
) -> None:
    """The configuration carries it, so a process without a GPU predicts alike."""
    found = None if capability is None else DeviceCapability(*capability)
    platform = engine_config.current_platform
    monkeypatch.setattr(type(platform), "get_device_capability", lambda *args, **kwargs: found)
    config = EngineArgs(
        str(GOLDEN / "dream-gqa"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=640,
        attention_backend="sparsed",
    ).create_engine_config()
    monkeypatch.undo()
    hf_config = config.model_config.hf_config
    heads = hf_config.num_attention_heads
    head_dim = hf_config.hidden_size // heads
    expected = None
    if capability is not None:
        costs = attention_costs(capability, head_dim, torch.float32)
        expected = Crossover(costs, heads, head_dim)
    assert engine_settings(config).crossover == expected


@contextmanager
def predicting(llm: LLM) -> Iterator[list[int]]:
    """Give the engine these costs; lists the pattern rows that requests take meanwhile."""
    core = llm.llm_engine.engine_core.engine_core
    runner, scheduler = runner_of(llm), core.scheduler
    store = runner.store
    assert store is not None
    before = runner.settings
    allocate = store.allocate
    taken: list[int] = []

    def watch(num_rows: int) -> list[int]:
        taken.append(num_rows)
        return allocate(num_rows)

    settings: Any = replace(before, crossover=Crossover(COSTS, num_heads=4, head_dim=16))
    runner.settings = scheduler.settings = settings
    store.allocate = watch  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        runner.settings = scheduler.settings = before
        del store.allocate


def request(
    length: int, steps: int = 16, **extra_args: Any
) -> tuple[dict[str, list[int]], SamplingParams]:
    params = SamplingParams(
        temperature=0.0,
        seed=1,
        max_tokens=32,
        ignore_eos=True,
        detokenize=False,
        extra_args={"diffusion_steps": steps, **extra_args},
    )
    return {"prompt_token_ids": [3 + i * 7 % 380 for i in range(length - 32)]}, params


def tokens_of(llm: LLM, *requests: tuple[dict[str, list[int]], SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(
        [prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_the_faster_attention_alone_and_in_a_batch(engine: Callable[..., LLM], model: str) -> None:
    llm = engine(model)
    auto = {"sparsed_dense_if_faster": True}
    with predicting(llm) as taken:
        alone = [tokens_of(llm, request(length, **auto))[0] for length in (100, 500)]
        assert taken == [-(-500 // BLOCK_SIZE)]
        taken.clear()
        batch = tokens_of(llm, *(request(length, **auto) for length in (100, 500, 100)))
        assert taken == [-(-500 // BLOCK_SIZE)]
        assert batch == [*alone, alone[0]]
        taken.clear()
        asked = tokens_of(llm, request(100, sparsed_dense_if_faster=False))[0]
        assert taken == [-(-100 // BLOCK_SIZE)]
    assert tokens_of(llm, request(100, sparsed_enabled=False))[0] == alone[0] != asked
    assert tokens_of(llm, request(100))[0] == asked
    assert tokens_of(llm, request(500))[0] == alone[1]
