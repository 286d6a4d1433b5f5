"""Rows of a CSV file, written as they come, so that a run cut short leaves what it measured."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.measuring.environment import COLUMNS, environment

DEFAULT_FOLDER: Final = Path("build/benchmarks")
"""Where results go unless told otherwise; git ignores it."""

Row = Mapping[str, object]


class RowFile:
    """A CSV file of fixed columns, those of the environment last."""

    def __init__(self, path: Path, columns: Sequence[str], append: bool = False) -> None:
        """Write the header.

        Args:
            path: its folder is created.
            columns: what a row may hold; what it lacks stays empty.
            append: keep the rows that are there.

        Raises:
            ValueError: the file to append to has other columns.
        """
        self.path = path
        self._columns = [*columns, *COLUMNS]
        self._environment = environment()
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            with path.open(newline="") as file:
                found = next(csv.reader(file), [])
            if found != self._columns:
                raise ValueError(f"{path} has other columns: choose another folder")
            return
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self._columns)

    def add(self, row: Row) -> None:
        """Append a row.

        Raises:
            ValueError: it has a column that the file has not.
        """
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writerow({name: _text(x) for name, x in {**row, **self._environment}.items()})

    def holds(self, figure: str, **values: object) -> bool:
        """Whether a row of this machine and these versions is there.

        Args:
            figure: column that must not be empty.
            values: columns that must have these values.
        """
        return has_row(self.path, figure, **values)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def has_row(path: Path, figure: str, **values: object) -> bool:
    """Whether a file has a row of this machine and these versions; see `RowFile.holds`."""
    wanted = {name: str(_text(x)) for name, x in {**values, **environment()}.items()}
    return any(
        row[figure] and all(row[name] == text for name, text in wanted.items())
        for row in read_rows(path)
    )


def reason(error: BaseException) -> str:
    """An error in one short line, as a table's note."""
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else "no message"
    return f"{type(error).__name__}: {first}"[:120]


def _text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value
