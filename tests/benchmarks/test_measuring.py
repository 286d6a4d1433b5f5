"""Quantiles and the rows of a table."""

from pathlib import Path

import pytest

from benchmarks.measuring.rows import RowFile, read_rows, reason
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


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speed"):
        RowFile(tmp_path / "table.csv", ("name",)).add({"name": "a", "speed": 1})


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("first\nsecond")) == "ValueError: first"
    assert reason(RuntimeError()) == "RuntimeError: no message"
