"""The pattern benchmark: its check and the small run."""

from pathlib import Path

import pytest
import torch

from benchmarks.kernels import pattern_inputs, patterns
from benchmarks.kernels.pattern_inputs import SMALL, USUAL, Layer, WrongPatternError, verify
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.rows import read_rows
from benchmarks.reference.models import LayerAttention
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.reference.sparse_pattern import block_pattern as reference_pattern


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.label)
def test_what_is_timed_builds_the_pattern(case: pattern_inputs.PatternCase) -> None:
    torch.manual_seed(1)
    layer = Layer.random(case, "cpu", patterns.dense_attention("cpu"))
    layer.build(case)
    settings = SparseSettings(0.2, case.select, case.block_size)
    attention = LayerAttention(layer.q.transpose(0, 1), layer.k.transpose(0, 1))
    expected = reference_pattern(attention, case.canvas, settings)
    built = torch.zeros_like(expected)
    for block, slot in enumerate(layer.slots.tolist()):
        for head in range(case.num_heads):
            count = int(layer.counts[slot, head])
            built[head, block, layer.indices[slot, head, :count].long()] = True
    assert torch.equal(built, expected)
    assert layer.density(case) == pytest.approx(float(expected.float().mean()))


def test_the_check_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(SMALL[0], "cpu") < 1e-5
    monkeypatch.setattr(pattern_inputs, "ALLOWED_ERROR", 1e-12)
    with pytest.raises(WrongPatternError, match="relative error"):
        verify(SMALL[0], "cpu")


def test_the_small_run_and_resuming_it(tmp_path: Path) -> None:
    small = ["--small", "--device", "cpu", "--output", str(tmp_path)]
    patterns.main([*small, "--lengths", "512"])
    patterns.main([*small, "--resume"])
    rows = read_rows(tmp_path / patterns.FILE)
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case.label, provider) for case in SMALL for provider in patterns.PROVIDERS
    ]
    for row in rows:
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"]), row["note"]
        assert (row["density"] != "") == (row["provider"] == patterns.OURS)


def test_nothing_is_measured_after_the_deadline() -> None:
    rows = list(patterns.Runner("cpu", Deadline(0.0)).rows(SMALL))
    assert len(rows) == len(SMALL) * len(patterns.PROVIDERS)
    assert all("ms" not in row and "minutes are used up" in row["note"] for row in rows)


def test_the_set_holds_what_it_promises() -> None:
    assert {case.length for case in USUAL} >= {1024 * 2**i for i in range(8)}
    assert {case.block_size for case in USUAL} == {32, 64, 128}
    assert {case.shape for case in USUAL} == {"llada", "dream"}
    assert len({case.label for case in USUAL}) == len(USUAL)
