"""The table of goals: figures out of the tables, and whether they are met."""

from pathlib import Path

import pytest

from benchmarks.engine import step_time
from benchmarks.engine.breakdown import PARTS, StepProfile
from benchmarks.kernels import attention, patterns
from benchmarks.kernels.cases import Case
from benchmarks.kernels.pattern_inputs import PatternCase
from benchmarks.measuring.rows import COLUMNS, RowFile, read_rows
from benchmarks.plots import summary
from benchmarks.plots.goals import Goal, goals_table, never_slower
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests import tables
from benchmarks.requests.plain_steps import Measurement
from benchmarks.requests.step_times import StepTimes
from benchmarks.serving import overhead


def kernel_row(case: Case, provider: str, ms: float, tflops: float = 0.0) -> dict[str, object]:
    kind = "dense" if "dense" in provider else "sparse"
    figures = {"ms": ms, "tflops": tflops or 600.0, "density": 0.3}
    return attention.describe(case) | {"provider": provider, "kind": kind} | figures


def write_attention(folder: Path) -> None:
    file = RowFile(folder / "attention.csv", attention.COLUMNS)
    large = Case("llada", (65536,))
    for row in (
        kernel_row(large, "ours", 32.0, 640.0),
        kernel_row(large, "FlashAttention 4, block-sparse", 33.0, 621.0),
        kernel_row(large, "FlashAttention 3, dense", 100.0, 700.0),
        kernel_row(Case("llada", (65536,), 64), "ours", 41.0, 512.0),
        kernel_row(Case("dream", (65536,), 32), "ours", 10.0, 640.0),
        {"case": "", "provider": "xformers, dense", "kind": "dense", "note": "not there"},
    ):
        file.add(row)


def write_requests(folder: Path) -> None:
    table = tables.RequestTables(folder)
    what = Measurement(65536, 1024, SparseSettings(0.2, 0.3, 128))
    times = StepTimes({"dense": [4.0], "building": [4.0], "sparse": [2.0]})
    for model in ("llada-8b", "dream-7b"):
        for provider in (tables.OURS_DENSE, tables.OURS_SPARSE):
            request = tables.describe(model, provider, "bfloat16", "none", what)
            sparse = provider == tables.OURS_SPARSE
            table.add(request, times, what, [128, 1024], sparse, 20.0)
    shares = dict.fromkeys(PARTS, 0.0) | {"attention": 60.0, "linear": 36.0, "rest": 4.0}
    worse = shares | {"linear": 34.0, "overhead": 2.0}
    request = tables.describe("llada-8b", tables.OURS_SPARSE, "bfloat16", "none", what)
    table.add_breakdown(
        request, {"dense": StepProfile(shares, []), "sparse": StepProfile(worse, [])}
    )


def rows_of(folder: Path) -> dict[str, tuple[str, ...]]:
    table = goals_table(folder)
    return {row[0]: tuple(row[1:]) for row in table.rows}


def test_every_goal_has_its_line_whether_measured_or_not(tmp_path: Path) -> None:
    found = rows_of(tmp_path)
    assert len(found) == 3 + 4 + 1 + 12 + 4 + 1 + 2
    assert {met for _, _, met in found.values()} == {"not measured"}


def test_kernels(tmp_path: Path) -> None:
    write_attention(tmp_path)
    found = rows_of(tmp_path)
    peer = "kernel of this package, block 128, 30%, {}: rate over FlashAttention 4 block-sparse"
    assert found[peer.format("64k")] == ("at least 1.000", "1.031", "yes")
    assert found[peer.format("16k")] == ("-", "-", "not measured")
    small = "kernel, block {}, 30%, 64k: share of block 128's rate"
    assert found[small.format(64)] == ("at least 85.0%", "80.0%", "no")
    # Dream's shape stands for nothing here.
    assert found[small.format(32)] == ("at least 60.0%", "-", "not measured")


def test_requests_steps_and_overhead(tmp_path: Path) -> None:
    write_requests(tmp_path)
    steps = RowFile(tmp_path / step_time.FILE, step_time.COLUMNS)
    short = {"model": "llada-8b", "length": 256, "dtype": "bfloat16", "quantization": None}
    steps.add(short | {"dense_step_ms": 8.0, "products_ms": 6.0})
    steps.add(short | {"dense_step_ms": 8.0})
    overheads = RowFile(tmp_path / overhead.FILE, overhead.COLUMNS)
    overheads.add({"batch_size": 1, "overhead_ms": 0.7})
    overheads.add({"batch_size": 64, "overhead_ms": 5.004})
    found = rows_of(tmp_path)
    # 26 dense steps and one that builds, of 128.
    seconds = 27 * 4 + 101 * 2
    name = "request, 64k, T = 128: speed-up over the same engine, dense"
    assert found[name] == ("at least 1.550", f"{512 / seconds:.3f}", "yes")
    name = "request, 64k, T = 128: speed-up over the FlexAttention loop"
    assert found[name] == ("at least 1.650, stretch 1.800", "-", "not measured")
    name = "step, 64k: neither attention nor linear layers"
    assert found[name] == ("at most 5.0%", "6.0%", "no")
    name = "step, 256 tokens: time over that of weight reads and products"
    assert found[name] == ("at most 1.300", "1.333", "no")
    assert found["engine overhead a step, batch 1"] == ("at most 2.000 ms", "0.700 ms", "yes")
    assert found["engine overhead a step, batch 64"] == ("at most 5.000 ms", "5.004 ms", "no")


@pytest.mark.parametrize(
    ("measured", "met"),
    [(1.5, "no"), (1.6, "yes"), (1.8, "yes, stretch too"), (None, "not measured")],
)
def test_a_stretch_is_told_apart(measured: float | None, met: str) -> None:
    assert Goal("", measured, 1.6, stretch=1.8).met() == met


def hopper(row: dict[str, object]) -> dict[str, str]:
    told = {**dict.fromkeys((*attention.COLUMNS, *COLUMNS), ""), **row, "device": "NVIDIA H200"}
    return {name: str(value) for name, value in told.items()}


def test_what_is_chosen_is_compared_with_dense_and_what_stays_dense_is_not() -> None:
    large, short = Case("llada", (65536,)), Case("llada", (1024,))
    build = patterns.Runner("cpu").describe(PatternCase(65536), "ours") | {"ms": 70.0}
    rows = [
        hopper(kernel_row(large, "ours", 33.0)),
        hopper(kernel_row(large, "FlashAttention 3, dense", 100.0)),
        # Slower than dense, but never chosen.
        hopper(kernel_row(short, "ours", 0.09)),
        hopper(kernel_row(short, "FlashAttention 3, dense", 0.05)),
    ]
    goal = never_slower(rows, [hopper(build)])
    # T = 8: 5 of the steps are sparse.
    assert goal.measured == pytest.approx((70 + 5 * 33) / (5 * 100))
    assert "(4 choices)" in goal.name and goal.met() == "yes"
    slow = [*rows[1:], hopper(kernel_row(large, "ours", 90.0))]
    assert never_slower(slow, [hopper(build)]).met() == "no"
    # FlashAttention 4 attends for these where it is there.
    given = [*slow, hopper(kernel_row(large, "FlashAttention 4, block-sparse", 31.0))]
    goal = never_slower(given, [hopper(build)])
    assert goal.measured == pytest.approx((70 + 5 * 31) / (5 * 100))
    # Elsewhere other costs decide.
    elsewhere = [row | {"device": "CPU"} for row in rows]
    assert never_slower(elsewhere, []).measured is None


def test_the_summary_begins_with_the_goals(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    source, target = tmp_path / "tables", tmp_path / "summary"
    write_attention(source)
    write_requests(source)
    summary.main([str(source), "--output", str(target)])
    headings = [x for x in (target / "README.md").read_text().splitlines() if x.startswith("## ")]
    assert headings[:2] == ["## Goals", "## Attention kernels"]
    assert "yes" in (target / "goals.csv").read_text()
    assert len(read_rows(target / "goals.csv")) == len(goals_table(source).rows)
