"""The crossover benchmark: its fit, its check and the small run."""

import math

import pytest
import torch

from benchmarks.kernels import crossover
from benchmarks.kernels.cost_fit import Measured, fit, fit_kernel, source
from vllm_sparsed.planning.crossover import AttentionCosts, KernelCost

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_DIM = 32, 128


def times_of(cost: KernelCost, kind: str = "dense", block_size: int = 0) -> list[Measured]:
    """What a kernel of exactly this cost would take."""
    times = []
    for length in LENGTHS:
        rows, flops = length * HEADS, 4.0 * length**2 * HEADS * HEAD_DIM
        ms = cost.seconds(rows, flops) * 1e3
        times.append(Measured(kind, block_size, length, ms, rows, flops))
    return times


@pytest.mark.parametrize(
    "cost",
    [
        KernelCost(65.0, 0.25, 600.0),
        KernelCost(200.0, 1.5, 300.0),
        KernelCost(60.0, 5.0, 1000.0),
    ],
    ids=["launch 65 us", "launch 200 us", "rows"],
)
def test_fit_finds_what_made_the_times(cost: KernelCost) -> None:
    found = fit_kernel(times_of(cost))
    assert found.launch_us == pytest.approx(cost.launch_us, rel=0.02)
    assert found.row_ns == pytest.approx(cost.row_ns, rel=0.05)
    assert found.rate == pytest.approx(cost.rate, rel=0.05)


def test_fit_of_noisy_times_predicts_them() -> None:
    cost = KernelCost(65.0, 0.1, 600.0)
    noisy = [
        Measured(t.kind, 0, t.length, t.ms * (1.05 if i % 2 else 0.95), t.rows, t.flops)
        for i, t in enumerate(times_of(cost))
    ]
    found = fit_kernel(noisy)
    assert min(found.launch_us, found.row_ns, found.rate) > 0
    for time in noisy:
        assert abs(math.log(found.seconds(time.rows, time.flops) * 1e3 / time.ms)) < 0.12


def test_fit_by_kernel_and_its_source() -> None:
    dense, sparse, build = (KernelCost(float(n), 1.0, 500.0) for n in (50, 60, 70))
    times = [
        *times_of(dense),
        *times_of(sparse, "sparse", 64),
        *times_of(build, "build", 64),
    ]
    costs = fit(times, lse_given=False)
    assert costs.dense.launch_us == 50
    assert (costs.sparse[64].launch_us, costs.build[64].launch_us) == (60, 70)
    names = {"AttentionCosts": AttentionCosts, "KernelCost": KernelCost}
    assert eval(source(costs), names) == costs


@pytest.mark.parametrize("kv_heads", [None, 4, 1])
def test_the_check_can_fail(kv_heads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = crossover.Layer(200, 4, 32, torch.float32, "cpu", kv_heads)
    building = layer.building(32, 100)
    layer.run(building)
    sparse = layer.sparse(building)
    layer.check(layer.dense())
    layer.check(sparse)
    assert building.store is not None
    building.store.counts[0, 3] -= 1
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda metadata: run(layer.dense()))
    with pytest.raises(RuntimeError, match="wrong result at 200 tokens"):
        layer.check(sparse)


def test_the_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    crossover.main(["--small", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert printed.count("chosen") == 1 + 3 * 2
    entry = printed[printed.index("AttentionCosts(") :]
    costs = eval(entry, {"AttentionCosts": AttentionCosts, "KernelCost": KernelCost})
    assert set(costs.sparse) == set(costs.build) == {32, 64}
    assert not costs.lse_given
