"""Which requests the comparison with FlashAttention 4 gives away."""

import pytest
import torch

from benchmarks.kernels import flash_attention_4 as command
from benchmarks.kernels.cases import Case
from benchmarks.kernels.flash_attention_4 import Comparison, entries, source
from vllm_sparsed.planning.crossover import FlashAttention4Range, KernelCost

COST = KernelCost(50.0, 0.2, 650.0)


def comparison(length: int, gain: float, select: float = 0.3, shape: str = "llada") -> Comparison:
    """Theirs takes what COST says, ours longer by this factor."""
    case = Case(shape, (length,), select=select)
    flops = 4.0 * length**2 * select * case.head_dim * case.num_heads
    ms = COST.seconds(length * case.num_heads, flops) * 1e3
    return Comparison(case, flops, gain * ms, ms, 0.01)


def test_the_longest_run_of_lengths_at_which_it_is_faster() -> None:
    gains = {2048: 1.2, 4096: 1.0, 8192: 1.05, 16384: 1.04, 32768: 1.06, 65536: 1.01}
    found = dict(entries([comparison(n, gain, 0.3) for n, gain in gains.items()]))
    assert list(found) == [1]
    assert (found[1].min_tokens, found[1].max_tokens, found[1].block_size) == (8192, 32768, 128)
    for field in ("row_ns", "rate"):
        assert getattr(found[1].cost, field) == pytest.approx(getattr(COST, field), rel=0.1)


def test_every_share_counts_and_each_ratio_of_heads_has_its_own() -> None:
    measured = [
        *(comparison(n, 1.05, select, "dream") for n in (4096, 8192) for select in (0.3, 0.5)),
        comparison(4096, 1.05, 0.3),
        comparison(4096, 0.99, 0.5),
    ]
    found = dict(entries(measured))
    assert list(found) == [7]
    assert (found[7].min_tokens, found[7].max_tokens) == (4096, 8192)


def test_a_batch_decides_nothing() -> None:
    assert not dict(entries([Comparison(Case("llada", (4096, 8192)), 1e12, 2.0, 1.0, 0.1)]))


def test_the_entry_is_python_for_the_table() -> None:
    fa4 = FlashAttention4Range(COST, 128, 4096, 65536)
    names = {"FlashAttention4Range": FlashAttention4Range, "KernelCost": KernelCost}
    assert eval(f"{{{source(7, fa4)}}}", names) == {((9, 0), 128, 7): fa4}


def test_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    with pytest.raises(SystemExit):
        command.main([])
    assert "compute capability 9.0" in capsys.readouterr().err
