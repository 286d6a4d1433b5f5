"""Six tasks in the manner of RULER whose answer is copied out of the document.

One needle, many keys, several values per key, variable tracking, common words, and questions about
a report of records.
"""

import random
from collections.abc import Callable
from typing import Final

from small_model.tasks.facts import (
    Fact,
    Facts,
    Question,
    draw_keys,
    draw_number,
    draw_numbers,
    fact_line,
)
from small_model.words import ADJECTIVES, MONTHS, NAMES, NOUNS

CHAIN_LENGTH: Final = 2  # variables that hold one value
VALUES_PER_KEY: Final = 2  # where a key has several
COMMON_RATIO: Final = 20  # occurrences of a common word for one of another
LIST_WORDS: Final = 8  # words on a line of a list


def _access_codes(rng: random.Random, count: int) -> Facts:
    codes = [(key, draw_number(rng)) for key in draw_keys(rng, count)]
    return Facts(
        [fact_line("access code", key, code) for key, code in codes],
        [Question(f"What is the access code of {key}?", code) for key, code in codes],
    )


def _single_needle(rng: random.Random, count: int) -> Facts:
    return _access_codes(rng, 1)


def _multi_value(rng: random.Random, count: int) -> Facts:
    """Keys with two values each, all of them mixed; the answer is in document order."""
    facts: list[tuple[str, str]] = []
    for key in draw_keys(rng, max(1, count // VALUES_PER_KEY)):
        facts += [(key, value) for value in draw_numbers(rng, VALUES_PER_KEY)]
    rng.shuffle(facts)
    values: dict[str, list[str]] = {}
    for key, value in facts:
        values.setdefault(key, []).append(value)
    return Facts(
        [fact_line("call number", key, value) for key, value in facts],
        [
            Question(f"What are the call numbers of {key}?", ", ".join(listed))
            for key, listed in values.items()
        ],
        unique=False,
    )


def _variable_tracking(rng: random.Random, count: int) -> Facts:
    """Chains of copies, mixed; a variable is copied after it was set."""
    chains = max(1, min(count, len(NOUNS)) // CHAIN_LENGTH)
    names = rng.sample(NOUNS, chains * CHAIN_LENGTH)
    values = draw_numbers(rng, chains)
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
            lines.append(fact_line("value", name, values[chain]))
        questions.append(Question(f"What is the value of {name}?", values[chain]))
        placed[chain] += 1
    return Facts(lines, questions)


def _report(rng: random.Random, count: int) -> Facts:
    """Records of four fields, all of them asked for."""
    lines, questions = [], []
    for key in draw_keys(rng, max(1, count // len(_FIELDS))):
        for field_name, draw in _FIELDS.items():
            value = draw(rng)
            lines.append(fact_line(field_name, key, value))
            questions.append(Question(f"What is the {field_name} of {key}?", value))
    return Facts(lines, questions)


def common_words(rng: random.Random, count: int) -> Facts:
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
    return Facts([(line,) for line in lines], [Question(question, common)], unique=False)


def _inspector(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(NAMES)} with badge {draw_number(rng, 6)}"


def _position(rng: random.Random) -> str:
    north, east = (f"{draw_number(rng, 2)}.{draw_number(rng, 4)}" for _ in range(2))
    return f"{north} north {east} east"


def _date(rng: random.Random) -> str:
    day, hour, minute = rng.randint(1, 28), rng.randrange(24), rng.randrange(60)
    month, year = rng.choice(MONTHS), rng.randint(1900, 2099)
    return f"{day:02d} {month} {year} at {hour:02d}:{minute:02d}"


_FIELDS: Final[dict[str, Callable[[random.Random], str]]] = {
    "inspector": _inspector,
    "position": _position,
    "serial number": draw_number,
    "date": _date,
}

LOOKUP_TASKS: Final[dict[str, Callable[[random.Random, int], Facts]]] = {
    "single_needle": _single_needle,
    "multi_key": _access_codes,
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": common_words,
    "report": _report,
}
