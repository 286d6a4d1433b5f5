"""Requests that FlashAttention 4 attends for: chosen by their own length, in any batch.

A stand-in that computes what this package's path computes takes its place, so tokens must stay.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability

from tests.engine.golden_cases import GOLDEN, MODELS, load_cases
from tests.engine.inspection import Rerun, runner_of
from tests.engine.test_golden import generate
from vllm_sparsed.attention import implementation
from vllm_sparsed.config import engine as engine_config
from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.kernels.block_sparse_attention import (
    QueryTiles,
    block_sparse_attention,
    flash_attention_4,
)
from vllm_sparsed.planning import kernel_costs
from vllm_sparsed.planning.crossover import Crossover, FlashAttention4Range, KernelCost
from vllm_sparsed.planning.kernel_costs import FLASH_ATTENTION_4, attention_costs, fa4_range
from vllm_sparsed.worker import startup

COST = KernelCost(50.0, 0.2, 700.0)
PEER = FlashAttention4Range(COST, 128, 4096, 65536)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Puts the stand-in in place; the lengths of the sequences that it served."""
    lengths: list[int] = []

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, pattern_rows: Tensor,
        *, scale: float, out: Tensor,
    ) -> Tensor:  # fmt: skip
        length = q.shape[0]
        assert pattern_rows.dtype == torch.int32
        lengths.append(length)
        block_size = 16 if -(-length // 16) == len(pattern_rows) else 32
        tiles = QueryTiles.build([0], [length], [pattern_rows.tolist()], block_size, q.device)
        return block_sparse_attention(q, k, v, indices, counts, tiles, scale=scale, out=out)

    monkeypatch.setattr(implementation, "flash_attention_4", stand_in)
    return lengths


@pytest.fixture
def peered(engine: Callable[..., LLM]) -> Iterator[Callable[..., LLM]]:
    """An engine whose packer gives sequences away."""
    changed: list[Any] = []

    def get(model: str, fa4: FlashAttention4Range, recording: bool = False) -> LLM:
        llm = engine(model)
        runner = runner_of(llm)
        if recording:
            runner.record_passes(4096, Rerun)
        runner.packer.use_flash_attention_4(fa4)
        changed.append(runner)
        return llm

    yield get
    for runner in changed:
        runner.packer.use_flash_attention_4(None)
        runner.graphs = None


def sparse_length(case: Any) -> int:
    return len(case.prompt) + int(case.params["gen"])


@pytest.mark.parametrize("recording", [False, True], ids=["passes", "graphs"])
@pytest.mark.parametrize("model", MODELS)
def test_golden_cases_with_some_sequences_given_away(
    peered: Callable[..., LLM], attended: list[int], model: str, recording: bool
) -> None:
    cases = load_cases(model)
    sparse = [case for case in cases if case.block_mask]
    block_size = max(case.params["sparsed"]["block_size"] for case in sparse)
    served = [case for case in sparse if case.params["sparsed"]["block_size"] == block_size]
    lengths = sorted({sparse_length(case) for case in served})
    llm = peered(model, FlashAttention4Range(COST, block_size, lengths[-1], lengths[-1]), recording)
    assert generate(llm, cases) == [case.expected for case in cases]
    assert set(attended) == {lengths[-1]}
    if recording:
        assert runner_of(llm).graphs.num_replays > 0
    attended.clear()
    for case in cases:
        assert generate(llm, [case]) == [case.expected]
    assert set(attended) == {lengths[-1]}


@pytest.mark.parametrize("end", ["too short", "too long", "other blocks", "chosen"])
def test_chosen_between_the_measured_lengths_alone(end: str) -> None:
    length, block_size = {
        "too short": (4095, 128), "too long": (65537, 128), "other blocks": (8192, 64),
        "chosen": (4096, 128),
    }[end]  # fmt: skip
    assert PEER.chosen(length, block_size) == (end == "chosen")


# Milliseconds of FlashAttention 4 on one H100, blocks of 128, by query heads per key head and
# tokens: 30% and 50% of the blocks kept.
MEASURED = {
    1: {4096: (0.160, 0.233), 8192: (0.549, 0.885), 16384: (2.052, 3.349), 32768: (7.961, 13.015),
        65536: (31.968, 51.871)},
    7: {4096: (0.140, 0.202), 8192: (0.477, 0.769), 16384: (1.818, 2.964), 32768: (6.947, 11.265),
        65536: (27.845, 46.243)},
}  # fmt: skip


@pytest.mark.parametrize("ratio", MEASURED)
def test_entries_hold_at_the_lengths_that_were_measured(ratio: int) -> None:
    fa4 = FLASH_ATTENTION_4[(9, 0), 128, ratio]
    assert (fa4.min_tokens, fa4.max_tokens) == (min(MEASURED[ratio]), max(MEASURED[ratio]))
    heads = {1: 32, 7: 28}[ratio]
    for length, times in MEASURED[ratio].items():
        blocks = length // fa4.block_size
        for select, ms in zip((0.3, 0.5), times, strict=True):
            kept = round(select * blocks) * fa4.block_size
            flops = 4.0 * length * kept * heads * 128
            assert fa4.cost.seconds(length * heads, flops) * 1e3 == pytest.approx(ms, rel=0.05)


def test_it_is_predicted_to_be_faster_than_ours_wherever_it_is_taken() -> None:
    for (capability, head_dim, ratio), fa4 in FLASH_ATTENTION_4.items():
        own, both = (
            attention_costs(
                capability, head_dim, torch.bfloat16, heads_per_kv_head=ratio, fa4=taken
            )
            for taken in (None, fa4)
        )
        for length in range(fa4.min_tokens, fa4.max_tokens + 1, 1021):
            ours, theirs = (
                Crossover(costs, 28, head_dim).predict(length, 128, 128, 0.3)
                for costs in (own, both)
            )
            assert theirs.sparse < ours.sparse


def test_predictions_are_those_of_the_kernel_that_runs() -> None:
    own = attention_costs((9, 0), 128, torch.bfloat16)
    both = attention_costs((9, 0), 128, torch.bfloat16, fa4=PEER)
    crossovers = [Crossover(costs, 32, 128) for costs in (own, both)]
    for length, block_size, faster in ((2048, 128, False), (8192, 128, True), (8192, 64, False)):
        ours, theirs = (x.predict(length, 128, block_size, 0.3) for x in crossovers)
        assert (theirs.sparse < ours.sparse) == faster
        assert (theirs.dense, theirs.build) == (ours.dense, ours.build)
        if not faster:
            assert theirs == ours


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, True),
        ({"installed": False}, False),
        ({"heads_per_kv_head": 7}, False),
        ({"dtype": torch.float32}, False),
        ({"capability": (10, 0)}, False),
    ],
    ids=lambda x: str(x),
)
def test_taken_only_where_it_is_there_serves_and_was_measured(
    changes: dict[str, Any], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {((9, 0), 128, 1): PEER, ((10, 0), 128, 1): PEER}
    monkeypatch.setattr(kernel_costs, "FLASH_ATTENTION_4", table)
    case: dict[str, Any] = {
        "capability": (9, 0), "head_dim": 128, "dtype": torch.bfloat16, "heads_per_kv_head": 1,
        "installed": True,
    }  # fmt: skip
    assert (fa4_range(**(case | changes)) == PEER) == found


@pytest.mark.parametrize("enabled", [True, False], ids=["enabled", "switched off"])
@pytest.mark.parametrize("installed", [False, True])
def test_all_processes_choose_by_what_was_found_at_start(
    monkeypatch: pytest.MonkeyPatch, installed: bool, enabled: bool
) -> None:
    """The configuration carries it; heads are counted in the whole model, not in a shard."""
    platform = engine_config.current_platform
    capability = DeviceCapability(9, 0)
    monkeypatch.setattr(type(platform), "get_device_capability", lambda *args, **kw: capability)
    monkeypatch.setattr(flash_attention_4, "installed", lambda: installed)
    config = EngineArgs(
        str(GOLDEN / "dream-gqa"),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=640,
        attention_backend="sparsed",
        additional_config={"sparsed": {"flash_attention_4": enabled}},
    ).create_engine_config()
    monkeypatch.setattr(flash_attention_4, "installed", lambda: not installed)
    monkeypatch.setattr(flash_attention_4, "serves", lambda *args: True)
    hf_config = config.model_config.hf_config
    heads, kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
    assert heads > kv_heads
    key = ((9, 0), hf_config.hidden_size // heads, heads // kv_heads)
    monkeypatch.setattr(kernel_costs, "FLASH_ATTENTION_4", {key: PEER})
    crossover = engine_settings(config).crossover
    assert crossover is not None
    assert crossover.costs.fa4 == (PEER if installed and enabled else None)


@pytest.mark.parametrize("longest", [4095, 8192])
@pytest.mark.parametrize("error", [None, ImportError("no module cutlass"), RuntimeError("differs")])
def test_a_start_compares_it_and_goes_on_without_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, longest: int
) -> None:
    """Where no request is long enough for it, nothing is compiled."""
    layer = SimpleNamespace(num_heads=8, num_kv_heads=2, head_size=128)
    used: list[FlashAttention4Range] = []
    checked: list[tuple[int, int]] = []

    def check(num_heads: int, num_kv_heads: int, *args: Any, **options: Any) -> None:
        checked.append((num_heads, num_kv_heads))
        if error is not None:
            raise error

    monkeypatch.setattr(flash_attention_4, "check", check)
    costs = attention_costs((9, 0), 128, torch.bfloat16, fa4=PEER)
    runner: Any = SimpleNamespace(
        store=SimpleNamespace(
            indices=torch.zeros(1, dtype=torch.int16), size=SimpleNamespace(width=9)
        ),
        device=torch.device("meta"),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
        settings=SimpleNamespace(
            crossover=Crossover(costs, 8, 128),
            max_model_len=longest,
        ),
        packer=SimpleNamespace(use_flash_attention_4=used.append),
    )
    startup.check_flash_attention_4(runner, layer)
    served = longest >= PEER.min_tokens
    assert checked == ([(8, 2)] if served else [])
    assert used == ([PEER] if served and not error else [])
