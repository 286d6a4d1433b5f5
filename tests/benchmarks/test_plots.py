"""Figures are drawn from the tables alone."""

from pathlib import Path

import pytest

from benchmarks.engine.breakdown import PARTS, StepProfile
from benchmarks.kernels import attention
from benchmarks.kernels.cases import Case
from benchmarks.measuring.rows import RowFile, read_rows
from benchmarks.plots import requests as request_plots
from benchmarks.plots import summary
from benchmarks.plots.draw import main
from benchmarks.plots.summary_tables import attention_table, missing, number
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests import tables
from benchmarks.requests.plain_steps import Measurement
from benchmarks.requests.step_times import StepTimes


def request_table(folder: Path) -> None:
    table = tables.RequestTables(folder)
    what = Measurement(65536, 1024, SparseSettings(0.2, 0.3, 128))
    for provider, quantization, sparse, seconds in (
        (tables.OURS_DENSE, "none", False, 4.0),
        (tables.OURS_SPARSE, "none", True, 2.0),
        (tables.OURS_SPARSE, "fp8", True, 1.0),
        (tables.PLAIN_SPARSE, "none", True, 3.0),
    ):
        times = StepTimes({"dense": [4.0], "building": [4.0], "sparse": [seconds]})
        request = tables.describe("llada-8b", provider, "bfloat16", quantization, what)
        table.add(request, times, what, [128, 1024], sparse, 20.0)
    parts = {kind: StepProfile(dict.fromkeys(PARTS, 1.0), []) for kind in ("dense", "sparse")}
    table.add_breakdown(request, parts)
    whole = tables.describe("llada-8b", tables.OURS_SPARSE, "bfloat16", "none", what)
    table.add_whole(whole, 128, 300.0)


def test_speed_ups(tmp_path: Path) -> None:
    request_table(tmp_path)
    rows = read_rows(tmp_path / tables.TOTALS_FILE)
    rows = [row for row in rows if row["extrapolated"] == "True"]
    # 26 dense steps and one that builds, of 128.
    ours = request_plots.speed_ups(rows, "ours, sparse", "ours, dense")
    assert ours["llada-8b", 65536, 128] == pytest.approx(512 / (27 * 4 + 101 * 2))
    fp8 = request_plots.speed_ups(rows, "ours, sparse, fp8", "ours, dense")
    assert fp8["llada-8b", 65536, 128] == pytest.approx(512 / (27 * 4 + 101))
    assert not request_plots.speed_ups(rows, "ours, sparse", "PyTorch, SDPA")


def test_png_and_svg_are_drawn_again_from_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    source, target = tmp_path / "tables", tmp_path / "figures"
    providers = ["ours", "PyTorch on CPU, dense"]
    small = ["--small", "--device", "cpu"]
    attention.main([*small, "--providers", *providers, "--output", str(source)])
    request_table(source)
    main([str(source), "--output", str(target)])
    names = {path.name for path in target.iterdir()}
    assert names == {
        f"{name}.{kind}"
        for name in ("attention_lengths", "request_speed_ups", "request_breakdown")
        for kind in ("png", "svg")
    }
    first = (target / "attention_lengths.svg").read_bytes()
    assert b"<svg" in first
    main([str(source), "--output", str(target)])
    assert (target / "attention_lengths.svg").read_bytes() == first


def test_a_folder_without_tables_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no table" in capsys.readouterr().err


ATTENTION = [
    {"case": "", "provider": "xformers, dense", "kind": "dense", "note": "not there"},
    *(
        attention.describe(Case("llada", (4096,), select=select))
        | {"provider": provider, "kind": kind, "ms": ms, "tflops": 1.0, "density": select}
        for select, provider, kind, ms in (
            (0.3, "ours", "sparse", 2.0),
            (0.3, "FlashAttention 3, dense", "dense", 4.0),
            (0.3, "FlashAttention 4, block-sparse", "sparse", 1.6),
            (0.9, "ours", "sparse", 5.0),
        )
    ),
]


def test_dense_times_stand_in_every_row_they_hold_for(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "attention.csv", attention.COLUMNS)
    for row in ATTENTION:
        file.add(row)
    table = attention_table(read_rows(file.path))
    assert table.header[4:] == (
        *("ours, TFLOP/s", "ours", "FlashAttention 3, dense", "FlashAttention 4, block-sparse"),
    )
    assert [row[3:] for row in table.rows] == [
        ["0.300", "1", "2", "4", "1.6"],
        ["0.900", "1", "5", "4", "-"],
    ]


def test_the_summary_says_where_ours_is_slower_and_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    source, target = tmp_path / "tables", tmp_path / "summary"
    request_table(source)
    file = RowFile(source / "attention.csv", attention.COLUMNS)
    for row in ATTENTION:
        file.add(row)
    summary.main([str(source), "--output", str(target)])
    report = (target / "README.md").read_text()
    assert "FlashAttention 3, dense: faster than ours in 1 of 2 cases, by up to 25%: " in report
    assert "FlashAttention 4, block-sparse: faster than ours in 1 of 1 cases" in report
    assert "not measured (not there): xformers, dense" in report
    # 26 dense steps and one that builds, of 128.
    assert f"| llada-8b | 64k | 128 | {512 / (27 * 4 + 101 * 2):.2f} |" in report
    assert (target / "request_speed_ups.csv").read_text().splitlines()[1].endswith(",1.25")
    assert (target / "attention_lengths.svg").exists()
    assert all(path.stat().st_size < 100_000 for path in target.iterdir())


def test_a_summary_is_of_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        summary.main([str(tmp_path)])
    assert "one machine" in capsys.readouterr().err


def test_numbers_are_short() -> None:
    values = (None, 0.012345, 1.5, 123.4, 5678.9)
    assert [number(x) for x in values] == ["-", "0.0123", "1.5", "123", "5679"]


def test_what_was_measured_later_is_not_missing() -> None:
    rows = [
        {"provider": "a", "ms": "", "note": "no memory"},
        {"provider": "b", "ms": "", "note": "no memory"},
        {"provider": "a", "ms": "1", "note": ""},
    ]
    assert missing(rows, ("provider",), "ms") == {"no memory": ["b"]}
