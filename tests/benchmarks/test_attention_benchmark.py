"""The attention benchmark: its inputs, its check, and the small run."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.kernels import attention
from benchmarks.kernels.attention import FLOOR, Runner
from benchmarks.kernels.cases import FULL, LENGTHS, SMALL, USUAL, Case, unique
from benchmarks.kernels.dense_providers import Run
from benchmarks.kernels.inputs import Inputs, WrongResultError, verify
from benchmarks.kernels.providers import ON_CPU, PROVIDERS, Provider
from benchmarks.kernels.sparse_providers import block_lists, ours, pooled
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.rows import read_rows

MIXED = Case("tiny", (64, 160, 32), 32, select=0.5, head_dim=16, dtype=torch.float32)


@pytest.fixture
def inputs() -> Inputs:
    torch.manual_seed(0)
    return Inputs.random(MIXED, "cpu")


def test_the_block_map_holds_each_request_apart(inputs: Inputs) -> None:
    """Blocks 2 + 5 + 1; half of them, rounded to even, but at least one: 1, 2 and 1 of each row."""
    kept = inputs.block_map
    assert kept.shape == (4, 8, 8)
    assert kept.sum(dim=2).unique(dim=0).tolist() == [[1, 1, 2, 2, 2, 2, 2, 1]]
    requests = torch.block_diag(torch.ones(2, 2), torch.ones(5, 5), torch.ones(1, 1)).bool()
    assert not kept[:, ~requests].any()
    assert inputs.density == pytest.approx((2 * 1 + 5 * 2 + 1) / (4 + 25 + 1))


def test_lists_hold_the_kept_blocks_ascending(inputs: Inputs) -> None:
    counts, indices = block_lists(inputs.block_map)
    assert counts.dtype == indices.dtype == torch.int32
    for head, row in ((0, 0), (1, 3), (3, 7)):
        kept = inputs.block_map[head, row].nonzero()[:, 0].tolist()
        assert indices[0, head, row, : counts[0, head, row]].tolist() == kept
    assert indices.sort(dim=-1).values.unique(dim=2).shape[2] == 1, "each block once"


def test_pooling_keeps_a_tile_of_which_anything_is_kept() -> None:
    kept = torch.zeros(1, 5, 5, dtype=torch.bool)
    kept[0, 1, 4] = kept[0, 4, 0] = True
    assert pooled(kept, 2).int().tolist() == [[[0, 0, 1], [0, 0, 0], [1, 0, 0]]]
    assert torch.equal(pooled(kept, 1), kept)


def test_the_check_tells_dense_from_sparse(inputs: Inputs) -> None:
    out = ours(inputs)()
    assert verify(out, inputs, sparse=True) < 1e-5
    with pytest.raises(WrongResultError, match="wrong result"):
        verify(out, inputs, sparse=False)
    out[inputs.checked_rows[3], 2, 1] = torch.nan
    with pytest.raises(WrongResultError, match="nan"):
        verify(out, inputs, sparse=True)


def test_a_provider_that_fails_or_is_wrong_is_a_row_without_a_time(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(x: Inputs) -> Run:
        raise ImportError("no such package")

    def wrong(x: Inputs) -> Run:
        return lambda: torch.zeros_like(x.q)

    monkeypatch.setitem(PROVIDERS, "missing", Provider(missing, sparse=True))
    monkeypatch.setitem(PROVIDERS, "wrong", Provider(wrong, sparse=True))
    runner = Runner("cpu", repetition_ms=0.0)
    for name, note in (("missing", "ImportError: no such package"), ("wrong", "wrong result")):
        row = runner.measure(inputs, name)
        assert "ms" not in row and note in row["note"]


def test_nothing_is_measured_after_the_deadline(inputs: Inputs) -> None:
    runner = Runner("cpu", repetition_ms=0.0, deadline=Deadline(0.0))
    row = runner.measure(inputs, "ours")
    assert "ms" not in row and row["note"] == "not started: the 0 minutes are used up"
    assert Runner("cpu", repetition_ms=0.0, deadline=Deadline(60.0)).measure(inputs, "ours")["ms"]


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(importlib, "import_module", missing)
    for name in ("FlashAttention 3, dense", "FlashAttention 4, block-sparse", "xformers, dense"):
        assert PROVIDERS[name].absent("cpu") == "needs a CUDA device"
        assert PROVIDERS[name].absent("cuda").startswith("cannot be imported: ImportError: no ")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "9.0" in PROVIDERS["FlashAttention 4, block-sparse"].absent("cuda")
    assert PROVIDERS["ours"].absent("cuda") == ""


def test_flops_count_both_products() -> None:
    x = Inputs.random(MIXED, "cpu")
    one = torch.ones(1)
    calls = 0

    def product(m: int, n: int, k: int) -> Tensor:
        nonlocal calls
        calls += 2 * m * n * k
        return one

    for length in MIXED.lengths:
        for _ in range(MIXED.num_heads):
            product(length, length, MIXED.head_dim)
            product(length, MIXED.head_dim, length)
    assert x.flops(1.0) == calls
    assert x.flops(0.25) == calls / 4


def test_the_small_run_and_resuming_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--small", "--device", "cpu", "--output", str(tmp_path)]
    attention.main([*small, "--lengths", "256"])
    first = read_rows(tmp_path / attention.FILE)
    attention.main([*small, "--resume"])
    rows = read_rows(tmp_path / attention.FILE)
    assert rows[: len(first)] == first
    ran = [(row["case"], row["provider"]) for row in rows if row["ms"]]
    assert len(ran) == len(set(ran)), "nothing is measured twice"
    for case in SMALL:
        assert (case.label, "ours") in ran
        assert (case.label, "FlexAttention, as released") in ran
        assert (case.label, FLOOR) in ran
    assert {row["case"] for row in first} == {"", SMALL[0].label, SMALL[1].label}
    for row in rows:
        if row["kind"] == "floor" or not row["ms"]:
            assert row["note"]
        else:
            assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
            assert float(row["error"]) < 1e-5
    absent = {row["provider"] for row in rows if not row["case"]}
    assert {"FlashAttention 3, dense", "xformers, dense"} < absent
    # Dense attention is timed once for each shape and length.
    dense = [row["lengths"] for row in rows if row["provider"] == ON_CPU]
    assert dense == ["256", "128+384"]


def test_the_sets_hold_what_they_promise() -> None:
    usual, full = unique(USUAL), unique(FULL)
    for shape in ("llada", "dream"):
        for block in (32, 64, 128):
            lengths = {c.lengths[0] for c in usual if (c.shape, c.block_size) == (shape, block)}
            assert lengths >= {4096, 16384, 65536}
            lengths = {c.lengths[0] for c in full if (c.shape, c.block_size) == (shape, block)}
            assert lengths >= set(LENGTHS)
        lengths = {c.lengths[0] for c in usual if (c.shape, c.block_size) == (shape, 128)}
        assert lengths >= set(LENGTHS)
        assert any(len(c.lengths) > 1 for c in usual if c.shape == shape)
    tenths = {i / 10 for i in range(1, 11)}
    assert {c.select for c in usual if c.lengths == (16384,)} >= tenths
    assert {c.select for c in full if c.lengths == (65536,)} >= tenths
    assert len({case.label for case in full}) == len(full)
    assert all(n % case.block_size == 0 for case in full for n in case.lengths)


def test_bad_arguments_name_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(["--small", "--cases", "nonsense", "--output", str(tmp_path)])
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        attention.main(["--small", "--lengths", "77", "--output", str(tmp_path)])
    assert "--lengths 77" in capsys.readouterr().err
