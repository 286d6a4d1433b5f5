"""Figures are drawn from the tables alone."""

from pathlib import Path

import pytest

from benchmarks.kernels import attention
from benchmarks.plots import requests as request_plots
from benchmarks.plots.draw import main
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests import tables
from benchmarks.requests.plain_steps import Measurement
from benchmarks.requests.step_times import StepTimes


def request_table(folder: Path) -> None:
    table = tables.RequestTables(folder)
    what = Measurement(65536, 1024, SparseSettings(0.2, 0.3, 128))
    for provider, quantization, sparse, seconds in (
        (tables.OURS_DENSE, None, False, 4.0),
        (tables.OURS_SPARSE, None, True, 2.0),
        (tables.OURS_SPARSE, "fp8", True, 1.0),
        (tables.PLAIN_SPARSE, None, True, 3.0),
    ):
        times = StepTimes({"dense": [4.0], "building": [4.0], "sparse": [seconds]})
        request = tables.describe("llada-8b", provider, "bfloat16", quantization, what)
        table.add(request, times, what, [128, 1024], sparse, 20.0)


def test_speed_ups(tmp_path: Path) -> None:
    request_table(tmp_path)
    rows = request_plots.read_rows(tmp_path / tables.TOTALS_FILE)
    assert {row["extrapolated"] for row in rows} == {"True"}
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
        for name in ("attention_lengths", "request_speed_ups")
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
