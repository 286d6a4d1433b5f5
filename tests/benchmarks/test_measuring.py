"""Quantiles and the rows of a table."""

from pathlib import Path

import pytest

from benchmarks.measuring import rows as rows_module
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.rows import RowFile, has_row, read_rows, reason
from benchmarks.measuring.timing import MIN_CALLS, Quantiles, time_calls


def test_quantiles_are_interpolated() -> None:
    assert Quantiles.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == Quantiles(2.0, 3.5, 5.0)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0)


def test_a_slow_call_is_still_repeated() -> None:
    calls: list[int] = []
    time_calls(lambda: calls.append(1), "cpu", budget_ms=0.0)
    assert len(calls) == MIN_CALLS


def test_rows_say_where_they_come_from_and_survive_appending(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "table.csv"
    RowFile(path, ("name", "ms", "note")).add({"name": "a", "ms": 1.23456789})
    RowFile(path, ("name", "ms", "note"), append=True).add({"name": "b", "note": "x, y"})
    rows = read_rows(path)
    assert [(row["name"], row["ms"], row["note"]) for row in rows] == [
        ("a", "1.2346", ""),
        ("b", "", "x, y"),
    ]
    assert all(row["device"] and row["torch"] and row["python"] for row in rows)
    RowFile(path, ("name",))
    assert read_rows(path) == []


def test_a_file_knows_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    file = RowFile(path, ("name", "share", "ms"))
    file.add({"name": "a", "share": 0.3, "ms": 1.0})
    file.add({"name": "b", "share": 0.3})
    assert file.holds("ms", name="a", share=0.3) and has_row(path, "ms", name="a")
    assert not file.holds("ms", name="b"), "a row without the figure does not count"
    assert not file.holds("ms", name="a", share=0.4)
    assert not has_row(tmp_path / "none.csv", "ms", name="a")
    elsewhere = rows_module.environment() | {"device": "another"}
    monkeypatch.setattr(rows_module, "environment", lambda: elsewhere)
    assert not file.holds("ms", name="a"), "another machine's figures do not count"


def test_rows_are_not_appended_to_another_table(tmp_path: Path) -> None:
    RowFile(tmp_path / "table.csv", ("name", "ms"))
    with pytest.raises(ValueError, match="other columns"):
        RowFile(tmp_path / "table.csv", ("name", "seconds"), append=True)


def test_a_deadline_passes() -> None:
    assert not Deadline().passed
    assert 50 < Deadline(1.0).seconds_left <= 60
    assert Deadline(0.0).passed


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed"):
        RowFile(tmp_path / "table.csv", ("name",)).add({"name": "a", "speed": 1})


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert reason(RuntimeError()) == "RuntimeError: no message"
