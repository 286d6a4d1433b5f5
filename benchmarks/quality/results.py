"""What was measured, as files: one row per answer, and what follows from all of them."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from benchmarks.quality.answering import Answered
from benchmarks.quality.cases import Case
from benchmarks.quality.intervals import paired_difference, wilson_interval
from benchmarks.quality.settings import DENSE, Setting, as_text, from_text, sort_key
from small_model.tasks import LINE_TASKS, TASKS, is_correct, right_lines

ALL_TASKS: Final = "all"  # in place of a task: all of them together
_PART: Final = re.compile(r"answers-(\d+)-of-(\d+)\.csv")


@dataclass(frozen=True, slots=True)
class Record:
    """One answer.

    Attributes:
        document: number within task and length: equal ones are paired.
        steps: passes taken.
        tokens: of the answer, with its end.
        sparse_tokens: those of them decided in steps with sparse attention.
        density: share of the key blocks that the patterns keep; None where none was built.
        lines: share of the right lines, of tasks whose answers have several; else 1 or 0.
        rows: computed in all passes.
        seconds: of the batch that it was asked in, divided by its requests.
        model: as it was named on the command line.
    """

    setting: Setting
    task: str
    length: int
    document: int
    correct: bool
    steps: int
    tokens: int
    sparse_tokens: int
    density: float | None
    answer: str
    expected: str
    lines: float = 0.0
    rows: int = 0
    seconds: float = 0.0
    model: str = ""


def record(setting: Setting, case: Case, answered: Answered, model: str = "") -> Record:
    """Judge an answer."""
    correct = is_correct(answered.text, case.answer)
    lines = right_lines(answered.text, case.answer) if case.task in LINE_TASKS else float(correct)
    return Record(
        setting=setting,
        task=case.task,
        length=case.length,
        document=case.document,
        correct=correct,
        steps=answered.steps,
        tokens=len(answered.decided),
        sparse_tokens=answered.sparse_tokens,
        density=answered.density,
        answer=answered.text,
        expected=case.answer,
        lines=round(lines, 5),
        rows=answered.rows,
        seconds=round(answered.seconds, 5),
        model=model,
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A line of quality.csv: one setting, task and length.

    Attributes:
        task: `ALL_TASKS` for all of them together.
        low, high: bounds of the exact match, 95% (Wilson).
        difference: of the exact match to dense attention with one token a pass and nothing kept,
            on the same documents; None where these were not asked.
        difference_low, difference_high: its bounds, 95% (Newcombe, paired).
        same_answer: share of the answers that are those of dense attention, right or wrong.
        density: mean share of the key blocks that the patterns keep.
        steps: mean of the passes taken.
        sparse_tokens: share of the answers' tokens decided in steps with sparse attention.
        right_lines: mean share of the right lines (`Record.lines`).
        tokens: mean length of the answers, with their ends.
        tokens_per_pass: tokens of the answers by passes.
        rows: mean of those computed.
        rows_per_token: rows computed by tokens of the answers.
        seconds: mean of those for an answer, in a batch.
    """

    setting: Setting
    task: str
    length: int
    documents: int
    correct: int
    exact_match: float
    low: float
    high: float
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    same_answer: float | None
    density: float | None
    steps: float
    sparse_tokens: float
    right_lines: float = 0.0
    tokens: float = 0.0
    tokens_per_pass: float = 0.0
    rows: float = 0.0
    rows_per_token: float = 0.0
    seconds: float = 0.0
    model: str = ""


def summarize(records: Iterable[Record]) -> list[Row]:
    """Rows per setting, task and length, and for all tasks together where there are several."""
    ordered = sorted(records, key=_place)
    dense = {_question(r): r for r in ordered if r.setting == DENSE}
    rows = []
    for (setting, length), of_length in _grouped(ordered, lambda r: (r.setting, r.length)):
        by_task = list(_grouped(of_length, lambda r: r.task))
        rows += [_row(setting, task, length, group, dense) for task, group in by_task]
        if len(by_task) > 1:
            rows.append(_row(setting, ALL_TASKS, length, of_length, dense))
    return rows


def asked_of_all(records: Iterable[Record]) -> list[Record]:
    """Answers about the documents that every setting of their length was asked about."""
    found = list(records)
    asked: dict[tuple[str, int, int], set[Setting]] = {}
    settings: dict[int, set[Setting]] = {}
    for r in found:
        asked.setdefault(_question(r), set()).add(r.setting)
        settings.setdefault(r.length, set()).add(r.setting)
    return [r for r in found if asked[_question(r)] == settings[r.length]]


def _row(
    setting: Setting,
    task: str,
    length: int,
    records: Sequence[Record],
    dense: dict[tuple[str, int, int], Record],
) -> Row:
    correct, documents = sum(r.correct for r in records), len(records)
    low, high = wilson_interval(correct, documents)
    pairs = [(r, dense[_question(r)]) for r in records if _question(r) in dense]
    difference = same = None
    bounds: tuple[float | None, float | None] = (None, None)
    if pairs and setting != DENSE:
        kinds = [(r.correct, d.correct) for r, d in pairs]
        both, gained, lost, neither = (kinds.count(kind) for kind in _KINDS)
        difference = (gained - lost) / len(pairs)
        bounds = paired_difference(both, gained, lost, neither)
        same = sum(r.answer == d.answer for r, d in pairs) / len(pairs)
    densities = [r.density for r in records if r.density is not None]
    tokens = sum(r.tokens for r in records)
    return Row(
        setting=setting,
        task=task,
        length=length,
        documents=documents,
        correct=correct,
        exact_match=round(correct / documents, 5),
        low=round(low, 5),
        high=round(high, 5),
        difference=_rounded(difference),
        difference_low=_rounded(bounds[0]),
        difference_high=_rounded(bounds[1]),
        same_answer=_rounded(same),
        density=round(sum(densities) / len(densities), 5) if densities else None,
        steps=round(sum(r.steps for r in records) / documents, 2),
        sparse_tokens=_ratio(sum(r.sparse_tokens for r in records), tokens),
        right_lines=_ratio(sum(r.lines for r in records), documents),
        tokens=_ratio(tokens, documents),
        tokens_per_pass=_ratio(tokens, sum(r.steps for r in records)),
        rows=_ratio(sum(r.rows for r in records), documents),
        rows_per_token=_ratio(sum(r.rows for r in records), tokens),
        seconds=_ratio(sum(r.seconds for r in records), documents),
        model=records[0].model,
    )


def _ratio(amount: float, of: float) -> float:
    return round(amount / of, 5) if of else 0.0


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


# Right with this setting and with dense attention: both, gained, lost, neither.
_KINDS: Final = ((True, True), (True, False), (False, True), (False, False))


def _question(r: Record) -> tuple[str, int, int]:
    return r.task, r.length, r.document


def _place(r: Record) -> tuple[Any, ...]:
    tasks = list(TASKS)
    return sort_key(r.setting), r.length, tasks.index(r.task), r.document


def _grouped(records: Iterable[Record], key: Any) -> Iterator[tuple[Any, list[Record]]]:
    for value, group in groupby(records, key):
        yield value, list(group)


def write_rows(path: Path, rows: Sequence[Record] | Sequence[Row]) -> None:
    """A CSV file of records or rows, the setting's fields first; None becomes nothing."""
    names = [f.name for f in fields(rows[0])][1:]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*as_text(rows[0].setting), *names], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(as_text(row.setting) | {name: getattr(row, name) for name in names})


def read_records(path: Path) -> list[Record]:
    """What `write_rows` wrote."""
    with path.open(newline="") as file:
        return [
            Record(
                setting=from_text(row),
                task=row["task"],
                length=int(row["length"]),
                document=int(row["document"]),
                correct=row["correct"] == "True",
                steps=int(row["steps"]),
                tokens=int(row["tokens"]),
                sparse_tokens=int(row["sparse_tokens"]),
                density=float(row["density"]) if row["density"] else None,
                answer=row["answer"],
                expected=row["expected"],
                lines=float(row["lines"]),
                rows=int(row["rows"]),
                seconds=float(row["seconds"]),
                model=row["model"],
            )
            for row in csv.DictReader(file)
        ]


def answers_path(folder: Path, part: int, parts: int) -> Path:
    """Where a process leaves its answers."""
    return folder / f"answers-{part}-of-{parts}.csv"


def merged_records(folder: Path) -> list[Record]:
    """Answers of all parts.

    Raises:
        ValueError: there are none, one is missing, or they are of different runs.
    """
    found = {path: _PART.fullmatch(path.name) for path in sorted(folder.glob("answers-*.csv"))}
    numbers = [(int(m[1]), int(m[2])) for m in found.values() if m]
    wanted = [(part, numbers[0][1]) for part in range(1, numbers[0][1] + 1)] if numbers else []
    if not numbers or sorted(numbers) != wanted:
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"{folder} must hold the answers of all parts of one run, found {names}")
    return sorted((r for path in found for r in read_records(path)), key=_place)


def main_settings(rows: Sequence[Row]) -> list[Setting]:
    """Dense and those asked at the same lengths with the same documents: the defaults."""
    asked: dict[Setting, set[tuple[str, int, int]]] = {}
    for row in rows:
        # Baselines and ablations are none, though all may have been asked the same.
        plain = not row.setting.has_shortcuts and row.setting.schedule == "reuse"
        if plain and row.setting.pattern in ("dense", "sparsed"):
            asked.setdefault(row.setting, set()).add((row.task, row.length, row.documents))
    most = max(asked.values(), key=lambda found: (len(found), max(found)[2]))
    return [setting for setting, found in asked.items() if found == most]


def pooled_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of all tasks together, or of the only task, at the length of most settings."""
    several = any(row.task == ALL_TASKS for row in rows)
    pooled = [row for row in rows if not several or row.task == ALL_TASKS]
    by_length = {r.length: sum(o.length == r.length for o in pooled) for r in pooled}
    length = max(by_length, key=lambda length: by_length[length])
    return [row for row in pooled if row.length == length]
