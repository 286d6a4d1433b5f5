"""How an answer is judged, and how long answers are."""

from typing import Final

LINE_TASKS: Final = ("ledger", "sorted_list", "records")
"""Whose answers have several lines or items."""

CANVAS: Final = {"ledger": 128, "sorted_list": 64, "records": 512}
"""Tokens that hold every answer of a task and the end of its turn; others: 32."""


def canvas_of(task: str) -> int:
    """Tokens of a canvas that holds any answer of the task."""
    return CANVAS.get(task, 32)


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, up to white space and the order of a list that has commas."""
    given, wanted = (
        sorted(tuple(item.split()) for item in text.split(",")) for text in (answer, expected)
    )
    return given == wanted


def right_lines(answer: str, expected: str) -> float:
    """Share of the expected lines, or items after a semicolon, that stand in the same place."""
    given, wanted = (_lines(text) for text in (answer, expected))
    right = sum(a == b for a, b in zip(given, wanted, strict=False))
    return right / max(len(given), len(wanted))


def _lines(text: str) -> list[list[str]]:
    text = text.strip()
    lines = text.split("\n") if "\n" in text else text.split(";")
    return [line.split() for line in lines]
