"""Seeded documents with questions whose answers are known, in the manner of RULER.

Six tasks: one needle, many keys, several values per key, variable tracking, common words, and
questions about a report of records. Every document is made here from templates, for any length.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from small_model.words import ADJECTIVES, FILLER, MONTHS, NAMES, NOUNS

CountTokens = Callable[[str], int]
"""Tokens of a text."""

Fact = tuple[str, ...]
"""A line in parts: every second one is a value that the rest of the line asks for."""

SPLITS: Final = ("train", "validation", "test")
MAX_FACTS: Final = 64  # per document, where the caller names no number
TOKENS_PER_FACT: Final = 64  # of a document's length, likewise
CHAIN_LENGTH: Final = 2  # variables that hold one value
VALUES_PER_KEY: Final = 2  # where a key has several
CODE_DIGITS: Final = 12  # of a number that is asked for: as long as a short sentence, in tokens
COMMON_RATIO: Final = 20  # occurrences of a common word for one of another
LIST_WORDS: Final = 8  # words on a line of a list
_BEFORE_VOWEL: Final = re.compile(r"\b([Aa]) (?=[aeiou])")
_FILLER_TRIES: Final = 4  # sentences tried where little room is left


@dataclass(frozen=True, slots=True)
class Question:
    """One chat turn and the answer expected."""

    text: str
    answer: str


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
    """

    tokens: int
    count: CountTokens
    turn_overhead: int = 0
    asked: int | None = 1
    facts: int | None = None
    filler: bool = True
    restated: float = 0.0


@dataclass(slots=True)
class _Facts:
    """What a task places.

    Attributes:
        lines: each a fact, or of one part alone.
        questions: with their answers.
        unique: whether each line tells its values from those of all others.
    """

    lines: list[Fact]
    questions: list[Question]
    unique: bool = True


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
            facts = _common_words(rng, _words_that_fit(wanted, limits))
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
        if room >= 0:
            # A list of words is long by itself.
            if limits.filler and task != "common_words":
                lines = _merged(rng, lines, _filler(rng, room, limits.count))
            return Document(task, tuple(lines), tuple(questions), tuple(restated))
        wanted = wanted * 3 // 4
    raise ValueError(f"{limits.tokens} tokens are too few for a document of {task}")


def is_correct(answer: str, expected: str) -> bool:
    """Exact match, up to white space and the order of a list."""
    given, wanted = (
        sorted(tuple(item.split()) for item in text.split(",")) for text in (answer, expected)
    )
    return given == wanted


def _turn_tokens(questions: Sequence[Question], limits: Limits) -> int:
    return sum(
        limits.count(q.text) + limits.count(q.answer) + limits.turn_overhead for q in questions
    )


def _number(rng: random.Random, digits: int = CODE_DIGITS) -> str:
    return f"{rng.randrange(10**digits):0{digits}d}"


def _numbers(rng: random.Random, count: int) -> list[str]:
    return [f"{n:0{CODE_DIGITS}d}" for n in rng.sample(range(10**CODE_DIGITS), count)]


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different pairs of an adjective and a noun."""
    drawn = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"the {ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in drawn]


def _line(what: str, key: str, value: str) -> Fact:
    """A number stands apart from the space before it, as its tokens do."""
    if value[0].isdigit():
        return (f"The {what} of {key} is ", value, ".\n")
    return (f"The {what} of {key} is", f" {value}", ".\n")


def _access_codes(rng: random.Random, count: int) -> _Facts:
    codes = [(key, _number(rng)) for key in _keys(rng, count)]
    return _Facts(
        [_line("access code", key, code) for key, code in codes],
        [Question(f"What is the access code of {key}?", code) for key, code in codes],
    )


def _single_needle(rng: random.Random, count: int) -> _Facts:
    return _access_codes(rng, 1)


def _multi_value(rng: random.Random, count: int) -> _Facts:
    """Keys with two values each, all of them mixed; the answer is in document order."""
    facts: list[tuple[str, str]] = []
    for key in _keys(rng, max(1, count // VALUES_PER_KEY)):
        facts += [(key, value) for value in _numbers(rng, VALUES_PER_KEY)]
    rng.shuffle(facts)
    values: dict[str, list[str]] = {}
    for key, value in facts:
        values.setdefault(key, []).append(value)
    return _Facts(
        [_line("call number", key, value) for key, value in facts],
        [
            Question(f"What are the call numbers of {key}?", ", ".join(listed))
            for key, listed in values.items()
        ],
        unique=False,
    )


def _variable_tracking(rng: random.Random, count: int) -> _Facts:
    """Chains of copies, mixed; a variable is copied after it was set."""
    chains = max(1, min(count, len(NOUNS)) // CHAIN_LENGTH)
    names = rng.sample(NOUNS, chains * CHAIN_LENGTH)
    values = _numbers(rng, chains)
    lines: list[Fact] = []
    questions = []
    order = [chain for chain in range(chains) for _ in range(CHAIN_LENGTH)]
    rng.shuffle(order)
    placed = [0] * chains
    for chain in order:
        members = names[chain::chains]
        name = members[placed[chain]]
        if placed[chain]:
            lines.append(
                (f"The value of {name} is that of", f" {members[placed[chain] - 1]}", ".\n")
            )
        else:
            lines.append(_line("value", name, values[chain]))
        questions.append(Question(f"What is the value of {name}?", values[chain]))
        placed[chain] += 1
    return _Facts(lines, questions)


def _report(rng: random.Random, count: int) -> _Facts:
    """Records of four fields, all of them asked for."""
    lines, questions = [], []
    for key in _keys(rng, max(1, count // len(_FIELDS))):
        for field_name, draw in _FIELDS.items():
            value = draw(rng)
            lines.append(_line(field_name, key, value))
            questions.append(Question(f"What is the {field_name} of {key}?", value))
    return _Facts(lines, questions)


def _common_words(rng: random.Random, count: int) -> _Facts:
    """`count` lines of words, one of which occurs twenty times as often as any other."""
    words = count * LIST_WORDS
    pool = rng.sample(NOUNS + ADJECTIVES, len(NOUNS) + len(ADJECTIVES))
    common, *others = pool
    times = -(-words // (COMMON_RATIO + len(others)))
    listed = [common] * (COMMON_RATIO * times)
    listed += (others * times)[: max(0, words - len(listed))]
    if len(listed) > words:
        # Few lines: the common word alone would be more than all of them.
        listed = [common] * COMMON_RATIO + others[:1]
    rng.shuffle(listed)
    lines = [" ".join(listed[i : i + LIST_WORDS]) + "\n" for i in range(0, len(listed), LIST_WORDS)]
    question = "Which word is the most common in the list?"
    return _Facts([(line,) for line in lines], [Question(question, common)], unique=False)


def _words_that_fit(wanted: int, limits: Limits) -> int:
    """Lines of words for the whole room; `wanted` shrinks where that was too much."""
    pool = NOUNS + ADJECTIVES
    line_tokens = limits.count(" ".join(pool) + "\n") * LIST_WORDS / len(pool) + 1
    room = (limits.tokens - limits.turn_overhead) * 0.9
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


def _inspector(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(NAMES)} with badge {_number(rng, 6)}"


def _position(rng: random.Random) -> str:
    north, east = (f"{_number(rng, 2)}.{_number(rng, 4)}" for _ in range(2))
    return f"{north} north {east} east"


def _date(rng: random.Random) -> str:
    day, hour, minute = rng.randint(1, 28), rng.randrange(24), rng.randrange(60)
    month, year = rng.choice(MONTHS), rng.randint(1900, 2099)
    return f"{day:02d} {month} {year} at {hour:02d}:{minute:02d}"


_FIELDS: Final[dict[str, Callable[[random.Random], str]]] = {
    "inspector": _inspector,
    "position": _position,
    "serial number": _number,
    "date": _date,
}

TASKS: Final[dict[str, Callable[[random.Random, int], _Facts]]] = {
    "single_needle": _single_needle,
    "multi_key": _access_codes,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "report": _report,
}
