"""What tasks share: facts, the questions about them, and how keys, numbers and lines are drawn."""

import random
from dataclasses import dataclass
from typing import Final

from small_model.words import ADJECTIVES, NOUNS

Fact = tuple[str, ...]
"""A line in parts: every second one is a value that the rest of the line asks for."""

CODE_DIGITS: Final = 8  # of a number that is asked for; each is a token


@dataclass(frozen=True, slots=True)
class Question:
    """One chat turn and the answer expected."""

    text: str
    answer: str


@dataclass(slots=True)
class Facts:
    """What a task places.

    Attributes:
        lines: each a fact, or of one part alone.
        questions: with their answers.
        unique: whether each line tells its values from those of all others.
    """

    lines: list[Fact]
    questions: list[Question]
    unique: bool = True


def draw_number(rng: random.Random, digits: int = CODE_DIGITS) -> str:
    return f"{rng.randrange(10**digits):0{digits}d}"


def draw_numbers(rng: random.Random, count: int) -> list[str]:
    return [f"{n:0{CODE_DIGITS}d}" for n in rng.sample(range(10**CODE_DIGITS), count)]


def draw_keys(rng: random.Random, count: int) -> list[str]:
    """Different pairs of an adjective and a noun."""
    drawn = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"the {ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in drawn]


def fact_line(what: str, key: str, value: str) -> Fact:
    """A number stands apart from the space before it, as its tokens do."""
    if value[0].isdigit():
        return (f"The {what} of {key} is ", value, ".\n")
    return (f"The {what} of {key} is", f" {value}", ".\n")
