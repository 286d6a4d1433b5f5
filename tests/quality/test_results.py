"""Statistics, files and tables of an evaluation, without an engine."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.quality.answering import Answered
from benchmarks.quality.cases import Case
from benchmarks.quality.intervals import paired_difference, wilson_interval
from benchmarks.quality.report import report_folder, warnings
from benchmarks.quality.results import (
    Record,
    Row,
    answers_path,
    asked_of_all,
    main_settings,
    merged_records,
    read_records,
    record,
    summarize,
    write_rows,
)
from benchmarks.quality.settings import DENSE, Setting, as_text, from_text
from benchmarks.quality.similarity import (
    FILE_NAME,
    Overlap,
    overlaps,
    read_overlaps,
    write_overlaps,
)

SPARSE = Setting(0.3, 0.2, 32)
EARLY = Setting(0.3, None, 32, "window", "from_start")
FAST = replace(DENSE, pace="threshold", pace_value=0.9)


@pytest.mark.parametrize(
    ("correct", "asked", "interval"),
    [
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
        (5, 10, (0.23659, 0.76341)),
        (190, 200, (0.91042, 0.97262)),
    ],
    ids=["none", "all", "half", "most"],
)
def test_wilson_interval(correct: int, asked: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(correct, asked) == pytest.approx(interval, abs=1e-4)


def test_wilson_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(
    ("counts", "interval"),
    [
        # The worked example of the paper.
        ((36, 12, 2, 0), (0.0569, 0.3404)),
        ((36, 2, 12, 0), (-0.3404, -0.0569)),
        # Without discordant pairs it is as wide as a Wilson interval of all or nothing.
        ((200, 0, 0, 0), (-0.0188, 0.0188)),
    ],
    ids=["paper", "swapped", "equal"],
)
def test_paired_difference(
    counts: tuple[int, int, int, int], interval: tuple[float, float]
) -> None:
    assert paired_difference(*counts) == pytest.approx(interval, abs=1e-4)


def test_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    """50 of 100 right with both: the same ones, or the other ones."""
    same, other = paired_difference(50, 0, 0, 50), paired_difference(0, 50, 50, 0)
    assert same[1] - same[0] < 0.1 < 0.3 < other[1] - other[0]


def test_record() -> None:
    case = Case("report", 256, 7, [1], "12345")
    answered = Answered("12346", [8, 9, 7, 11, 2, 30], 31, 0.4, 4, 900, 0.25)
    assert record(SPARSE, case, answered, "some-model") == Record(
        setting=SPARSE,
        task="report",
        length=256,
        document=7,
        correct=False,
        steps=31,
        tokens=6,
        sparse_tokens=4,
        density=0.4,
        answer="12346",
        expected="12345",
        lines=0.0,
        rows=900,
        seconds=0.25,
        model="some-model",
    )
    right = record(SPARSE, case, replace(answered, text=" 12345\n"))
    assert right.correct and right.lines == 1.0
    case = Case("ledger", 256, 7, [1], "May 1 001\nJune 2 003")
    assert record(SPARSE, case, replace(answered, text="May 1 001\nJune 2 004")).lines == 0.5


def some_records() -> list[Record]:
    """Dense: 3 of 4 in each task; sparse: loses the first document, gains the last."""
    found = []
    for task in ("multi_key", "report"):
        for document in range(4):
            dense = Record(DENSE, task, 256, document, document < 3, 32, 6, 0, None, "a, b", "c")
            sparse = replace(
                dense,
                setting=SPARSE,
                correct=document > 0,
                steps=28 + document,
                sparse_tokens=5,
                density=0.25 + 0.1 * document,
                rows=3000,
                seconds=0.5,
                answer="a, b" if document else "x",
            )
            found += [sparse, dense]
    return found


def test_summary_rows() -> None:
    rows = summarize(some_records())
    assert [(row.setting, row.task) for row in rows] == [
        (DENSE, "multi_key"),
        (DENSE, "report"),
        (DENSE, "all"),
        (SPARSE, "multi_key"),
        (SPARSE, "report"),
        (SPARSE, "all"),
    ]
    assert rows[0].difference is None
    low, high = paired_difference(2, 1, 1, 0)
    assert rows[3] == Row(
        setting=SPARSE,
        task="multi_key",
        length=256,
        documents=4,
        correct=3,
        exact_match=0.75,
        low=0.30064,
        high=0.95441,
        difference=0.0,
        difference_low=round(low, 5),
        difference_high=round(high, 5),
        same_answer=0.75,
        density=0.4,
        steps=29.5,
        sparse_tokens=0.83333,
        tokens=6.0,
        tokens_per_pass=round(24 / 118, 5),
        rows=3000.0,
        rows_per_token=500.0,
        seconds=0.5,
    )
    assert (rows[5].documents, rows[5].correct) == (8, 6)


def test_pairs_are_the_same_documents() -> None:
    """Dense answers to other documents say nothing about the difference."""
    records = [r for r in some_records() if r.setting == SPARSE or r.document == 0]
    row = summarize(records)[3]
    assert (row.documents, row.difference) == (4, -1.0)


def test_settings_are_compared_on_the_same_documents() -> None:
    records = some_records()
    lengths = {r.length for r in records}
    few = [replace(r, setting=EARLY) for r in records if r.setting.is_dense and r.document < 2]
    few = [r for r in few if r.length == min(lengths)]
    kept = asked_of_all([*records, *few])
    assert kept == [r for r in [*records, *few] if r.document < 2 or r.length != min(lengths)]
    assert asked_of_all(records) == records


def test_shortcuts_are_compared_with_one_token_a_pass() -> None:
    """Dense attention alone is no baseline: several tokens a pass may lose answers."""
    records = some_records()
    fast = [
        replace(r, setting=FAST, correct=r.document < 1, steps=2)
        for r in records
        if r.setting == DENSE
    ]
    rows = {(r.setting, r.task): r for r in summarize([*records, *fast])}
    assert rows[FAST, "all"].difference == -0.5
    assert rows[FAST, "all"].tokens_per_pass == 3.0
    assert rows[DENSE, "all"].difference is None
    assert rows[SPARSE, "all"].difference == 0.0
    assert main_settings(list(rows.values())) == [DENSE, SPARSE]


def test_records_come_back(tmp_path: Path) -> None:
    records = [*some_records(), replace(some_records()[0], setting=EARLY, answer='"\n,')]
    write_rows(tmp_path / "records.csv", records)
    assert read_records(tmp_path / "records.csv") == records


@pytest.mark.parametrize(
    "setting",
    [DENSE, SPARSE, EARLY, FAST, replace(SPARSE, kv_reuse="window", refresh=8, margin=0)],
    ids=["dense", "sparse", "early", "fast", "window"],
)
def test_settings_come_back(setting: Setting) -> None:
    assert from_text(as_text(setting)) == setting


def test_merged_parts_are_one_run(tmp_path: Path) -> None:
    records = some_records()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    write_rows(answers_path(whole, 1, 1), records)
    write_rows(answers_path(parts, 1, 2), records[5:])
    write_rows(answers_path(parts, 2, 2), records[:5])
    assert merged_records(parts) == merged_records(whole)
    assert report_folder(parts, plots=False) == report_folder(whole, plots=False)
    assert (parts / "quality.csv").read_bytes() == (whole / "quality.csv").read_bytes()
    line = next(csv.DictReader((whole / "quality.csv").open()))
    assert (line["pattern"], line["select"], line["exact_match"]) == ("dense", "", "0.75")


@pytest.mark.parametrize(
    "names",
    [[], ["answers-1-of-2.csv"], ["answers-1-of-1.csv", "answers-1-of-2.csv"]],
    ids=["none", "missing", "two-runs"],
)
def test_refuses_other_than_all_parts(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="must hold the answers of all parts of one run"):
        merged_records(tmp_path)


def test_summary(tmp_path: Path) -> None:
    write_rows(answers_path(tmp_path, 1, 1), some_records())
    write_overlaps(tmp_path / FILE_NAME, overlaps([PATTERNS], 32))
    text = report_folder(tmp_path, plots=False)
    assert "| all | 256 | 8 | 75.0 [40.9, 92.9] | 75.0 [40.9, 92.9] | +0.0 [" in text
    sparse = (
        "| select 0.3, skip 0.2, block 32 | 256 | 8 | 0.400 | 29.5 | 0.20 | 500 | 0.500 | 83% |"
    )
    assert f"{sparse} 75% | 75.0 [" in text
    assert "| select 0.3, skip 0.2, block 32 | 75.0 | 75.0 |\n" in text
    assert "| 32 | 0 | 0.500 | 0.500 | 0.500 | 0.500 |\n" in text
    assert (tmp_path / "summary.md").read_text() == text
    assert "Note:" not in text


def test_warns_of_too_few_sparse_tokens() -> None:
    records = [replace(r, sparse_tokens=min(r.sparse_tokens, 3)) for r in some_records()]
    (note,) = warnings(summarize(records))
    assert note.startswith(
        "Note: select 0.3, skip 0.2, block 32; 256 tokens: only 50% of the answers' tokens were "
        "decided in sparse steps, 29.5 steps taken."
    )


def test_main_settings() -> None:
    """Those with all documents; one with fewer is a point of a sweep."""
    few = [replace(r, setting=EARLY) for r in some_records()[::2] if r.document < 2]
    assert main_settings(summarize([*some_records(), *few])) == [DENSE, SPARSE]


# Two steps, one layer, two heads, two rows of two blocks, one kept in each.
PATTERNS = torch.tensor(
    [[[[[1, 0], [1, 0]], [[1, 0], [0, 1]]]], [[[[1, 0], [0, 1]], [[0, 1], [0, 1]]]]]
).bool()


def test_overlaps(tmp_path: Path) -> None:
    found = overlaps([PATTERNS], 32)
    assert [(o.kind, o.first, o.second, o.overlap) for o in found] == [
        ("steps", 0, 0, 1.0),
        ("steps", 0, 1, 0.5),
        ("steps", 1, 0, 0.5),
        ("steps", 1, 1, 1.0),
        ("heads", 0, 0, 1.0),
        ("heads", 0, 1, 0.5),
        ("heads", 1, 0, 0.5),
        ("heads", 1, 1, 1.0),
    ]
    assert found[0] == Overlap("steps", 32, 0, 0, 0, 1.0, 0.5)
    write_overlaps(tmp_path / "overlaps.csv", found)
    assert read_overlaps(tmp_path / "overlaps.csv") == found


@pytest.mark.parametrize("documents", [2, 4], ids=["fewer in the sweep", "the same for all"])
def test_plots(tmp_path: Path, documents: int) -> None:
    pytest.importorskip("matplotlib")
    varied = [replace(r, setting=replace(SPARSE, select=0.5)) for r in some_records()[::2]]
    early = [replace(r, setting=EARLY) for r in some_records()[::2]]
    shared = [replace(r, setting=replace(SPARSE, pattern="shared_heads")) for r in varied]
    fast = [replace(r, setting=FAST, steps=3) for r in some_records()[1::2]]
    sweep = [r for r in [*varied, *early, *shared, *fast] if r.document < documents]
    write_rows(answers_path(tmp_path, 1, 1), [*some_records(), *sweep])
    write_overlaps(tmp_path / FILE_NAME, overlaps([PATTERNS], 32))
    text = report_folder(tmp_path)
    names = "by-length, parameters, baselines, ablations, similarity, tokens-per-pass"
    assert text.endswith(f"Plots: {names}, rows-per-token\n")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        drawn = sorted(tmp_path.glob(f"*.{suffix}"))
        assert len(drawn) == 7
        assert all(path.read_bytes().startswith(start) for path in drawn)
