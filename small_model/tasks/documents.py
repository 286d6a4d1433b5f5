"""Seeded documents with questions whose answers are known: their size and what fills them up."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from small_model.tasks.dependent import DEPENDENT_TASKS
from small_model.tasks.facts import Fact, Facts, Question
from small_model.tasks.lookups import LIST_WORDS, LOOKUP_TASKS, common_words
from small_model.words import ADJECTIVES, FILLER, MONTHS, NAMES, NOUNS

CountTokens = Callable[[str], int]
"""Tokens of a text."""

TASKS: Final[dict[str, Callable[[random.Random, int], Facts]]] = LOOKUP_TASKS | DEPENDENT_TASKS
"""By name; each makes about so many facts and the questions about them."""

SPLITS: Final = ("train", "validation", "test")
MAX_FACTS: Final = 64  # per document, where the caller names no number
TOKENS_PER_FACT: Final = 64  # of a document's length, likewise
_BEFORE_VOWEL: Final = re.compile(r"\b([Aa]) (?=[aeiou])")
_FILLER_TRIES: Final = 4  # sentences tried where little room is left


@dataclass(frozen=True, slots=True)
class Document:
    """Lines, each with its line break, and the questions about them.

    Attributes:
        task: a name of `TASKS`.
        restated: facts that stand in it and are to be said once more, for training.
    """

    task: str
    lines: tuple[str, ...]
    questions: tuple[Question, ...]
    restated: tuple[Fact, ...] = ()

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def prompt(self, question: Question) -> str:
        """The first user turn that asks the question."""
        return self.text + question.text


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a document may become.

    Attributes:
        tokens: of the lines, the questions, their answers and `turn_overhead` for each question.
        count: counts the tokens of a line, a question or an answer.
        turn_overhead: tokens that a chat template adds to a question and its answer.
        asked: questions kept, the first one drawn at random; None: all.
        facts: facts to place; None: by the length, at most 64.
        filler: whether the rest is filled with other sentences.
        restated: share of the facts to be said once more, room for them included; only facts that
            their line alone tells from all others.
        canvas: tokens kept for each answer and the end of its turn; None: what the answer takes.
    """

    tokens: int
    count: CountTokens
    turn_overhead: int = 0
    asked: int | None = 1
    facts: int | None = None
    filler: bool = True
    restated: float = 0.0
    canvas: int | None = None


def make_document(task: str, split: str, seed: int, limits: Limits) -> Document:
    """A document that depends on the arguments alone.

    The random numbers are seeded with split, task, length and seed together, so no two splits share
    one.

    Args:
        task: a name of `TASKS`.
        split: train, validation or test.
        seed: number of the document within split, task and length.
        limits: its size.

    Raises:
        ValueError: unknown task or split, or `limits.tokens` holds not even one fact.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    rng = random.Random(f"{split}/{task}/{limits.tokens}/{seed}")
    wanted = limits.facts or max(4, min(MAX_FACTS, limits.tokens // TOKENS_PER_FACT))
    while wanted:
        if task == "common_words" and limits.filler:
            facts = common_words(rng, _words_that_fit(wanted, limits))
        else:
            facts = TASKS[task](rng, wanted)
        # The order of the questions must not give away that of the facts.
        rng.shuffle(facts.questions)
        questions = facts.questions[: limits.asked]
        lines = ["".join(line) for line in facts.lines]
        known = facts.lines if facts.unique else []
        restated = rng.sample(known, int(limits.restated * len(known)))
        room = limits.tokens - _turn_tokens(questions, limits)
        room -= sum(map(limits.count, [*lines, *map("".join, restated)]))
        if room >= 0 and _answers_fit(questions, limits):
            # A list of words is long by itself.
            if limits.filler and task != "common_words":
                lines = _merged(rng, lines, _filler(rng, room, limits.count))
            return Document(task, tuple(lines), tuple(questions), tuple(restated))
        wanted = wanted * 3 // 4
    raise ValueError(f"{limits.tokens} tokens are too few for a document of {task}")


def _turn_tokens(questions: Sequence[Question], limits: Limits) -> int:
    return sum(
        limits.count(q.text) + (limits.canvas or limits.count(q.answer)) + limits.turn_overhead
        for q in questions
    )


def _answers_fit(questions: Sequence[Question], limits: Limits) -> bool:
    canvas = limits.canvas
    return canvas is None or all(limits.count(q.answer) < canvas for q in questions)


def _words_that_fit(wanted: int, limits: Limits) -> int:
    """Lines of words for the whole room; `wanted` shrinks where that was too much."""
    pool = NOUNS + ADJECTIVES
    line_tokens = limits.count(" ".join(pool) + "\n") * LIST_WORDS / len(pool) + 1
    room = (limits.tokens - limits.turn_overhead - (limits.canvas or 0)) * 0.9
    full = max(4, min(MAX_FACTS, limits.tokens // TOKENS_PER_FACT))
    share = 1.0 if limits.facts is not None else wanted / full
    return max(1, int(room * min(1.0, share) / line_tokens))


def _filler(rng: random.Random, room: int, count: CountTokens) -> list[str]:
    """Sentences of at most `room` tokens together."""
    lines: list[str] = []
    misses = 0
    while misses < _FILLER_TRIES:
        template = rng.choice(FILLER)
        line = template
        for name, words in _FILLER_WORDS.items():
            while name in line:
                line = line.replace(name, rng.choice(words), 1)
        line = _BEFORE_VOWEL.sub(r"\1n ", line) + "\n"
        tokens = count(line)
        if tokens <= room:
            lines.append(line)
            room -= tokens
        else:
            misses += 1
    return lines


def _merged(rng: random.Random, facts: list[str], filler: list[str]) -> list[str]:
    """Both in their order, mixed at random."""
    places = set(rng.sample(range(len(facts) + len(filler)), len(facts)))
    next_fact, next_filler = iter(facts), iter(filler)
    return [
        next(next_fact if place in places else next_filler)
        for place in range(len(facts) + len(filler))
    ]


_FILLER_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "{name}": NAMES,
    "{adjective}": ADJECTIVES,
    "{noun}": NOUNS,
    "{month}": MONTHS,
    "{small}": tuple(str(n) for n in range(2, 100)),
}
