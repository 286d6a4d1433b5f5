"""The window benchmark: its check and the small run."""

from pathlib import Path

import pytest
import torch

from benchmarks.kernels import window
from benchmarks.kernels.window import FLOOR, OURS, SDPA, SMALL, USUAL, Inputs, WrongResultError
from benchmarks.measuring.rows import read_rows


def test_the_small_run(tmp_path: Path) -> None:
    window.main(["--small", "--device", "cpu", "--output", str(tmp_path)])
    rows = read_rows(tmp_path / window.FILE)
    assert {row["case"] for row in rows} == {case.label for case in SMALL}
    for row in rows:
        measured = row["provider"] in (FLOOR, OURS) or (
            row["provider"] == SDPA and row["select"] == "dense" and row["pages"] != "fp8"
        )
        assert bool(row["us"]) == measured, row
        assert measured or row["note"], row


@pytest.mark.parametrize("case", SMALL[:3], ids=lambda case: case.label)
def test_the_check_can_fail(case: window.WindowCase) -> None:
    torch.manual_seed(0)
    x = Inputs.random(case, "cpu")
    out = window.ours(x)()
    assert window.verify(out, x) < 1e-5
    out[5, 1] += 0.01
    with pytest.raises(WrongResultError, match="wrong result"):
        window.verify(out, x)


def test_bytes_are_those_of_kept_blocks() -> None:
    torch.manual_seed(0)
    dense, sparse = (Inputs.random(case, "cpu") for case in SMALL[6:8])
    assert dense.num_bytes == dense.k_pages.numel() * 2 * 4
    assert sparse.num_bytes < dense.num_bytes


def test_the_set_holds_what_it_promises() -> None:
    labels = {case.label for case in USUAL}
    assert {"llada-64k-dense", "llada-64k-30%-1", "dream-1.25k-30%-2-fp8"} <= labels


def test_only_the_small_set_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        window.main(["--device", "cpu"])
    assert "only --small runs on a CPU" in capsys.readouterr().err
