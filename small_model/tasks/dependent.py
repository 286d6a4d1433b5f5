"""Six tasks whose answers have tokens that depend on each other.

Each piece of an answer is found or computed from the piece before it: a chain of look-ups, an
account with running totals, a list in order, the records of a tour, a sum with its carries, and a
number that stands where the first half of the answer says.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from math import isqrt
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

LONGEST_CHAIN: Final = 6  # hops; a question asks for 3 to so many
SHORTEST_CHAIN: Final = 3
ENTRIES: Final = (6, 12)  # of an account, one a month
AMOUNTS: Final = (10, 83)  # twelve of them have a total of three digits
LIST_ITEMS: Final = (6, 10)
TOUR_STOPS: Final = (12, 22)  # 276 to 506 tokens
ADDEND_DIGITS: Final = 8
LONG_CARRIES: Final = 0.5  # share of the digits of two addends that make nine together


def _chain(rng: random.Random, count: int) -> Facts:
    """Copies of copies of a value, in any order; the answer writes every hop."""
    hops = max(1, min(LONGEST_CHAIN, count - 1))
    chains = max(1, min(count, len(NOUNS)) // (hops + 1))
    names = rng.sample(NOUNS, chains * (hops + 1))
    lines: list[Fact] = []
    questions = []
    for chain, value in enumerate(draw_numbers(rng, chains)):
        members = names[chain::chains]
        for name, source in pairwise(members):
            lines.append((f"The value of {name} is that of", f" {source}", ".\n"))
        lines.append(fact_line("value", members[-1], value))
        # One for each chain: the answer to another would hold the rest of the way.
        first = rng.randrange(max(1, hops + 1 - SHORTEST_CHAIN))
        way = " -> ".join(members[first:])
        questions.append(Question(f"Follow the value of {members[first]}.", f"{way}: {value}"))
    rng.shuffle(lines)
    return Facts(lines, questions)


def _ledger(rng: random.Random, count: int) -> Facts:
    """Payments of several people, one a month; the answer has the running totals of one of them."""
    accounts: list[list[Fact]] = []
    questions: dict[int, list[Question]] = {}
    people = iter(rng.sample(NAMES, len(NAMES)))
    for entries in _sizes(rng, count, ENTRIES, len(NAMES)):
        person, total, lines, rows = next(people), 0, [], []
        for month in MONTHS[:entries]:
            amount = rng.randint(*AMOUNTS)
            total += amount
            lines.append(fact_line("payment", f"{person} in {month}", str(amount)))
            rows.append(f"{month} {amount} {total:03d}")
        text = f"What did {person} pay until {MONTHS[entries - 1]}, with totals?"
        questions.setdefault(entries, []).append(Question(text, "\n".join(rows)))
        accounts.append(lines)
    # Every account in its order, all of them mixed.
    order = [number for number, lines in enumerate(accounts) for _ in lines]
    rng.shuffle(order)
    rest = [iter(lines) for lines in accounts]
    return Facts([next(rest[number]) for number in order], _long_ones(questions, ENTRIES))


def _sorted_list(rng: random.Random, count: int) -> Facts:
    """Trips of several people; the answer lists those of one of them by month."""
    lines: list[Fact] = []
    questions: dict[int, list[Question]] = {}
    people = iter(rng.sample(NAMES, len(NAMES)))
    for items in _sizes(rng, count, LIST_ITEMS, len(NAMES)):
        person, rows = next(people), []
        months = sorted(rng.sample(range(len(MONTHS)), items))
        for month in months:
            goal = rng.choice(NOUNS)
            if rng.random() < 0.5:
                goal = f"{rng.choice(ADJECTIVES)} {goal}"
            lines.append((f"The trip of {person} in {MONTHS[month]} is", f" {goal}", ".\n"))
            rows.append(f"{MONTHS[month]} {goal}")
        text = f"List the trips of {person} by month until {MONTHS[months[-1]]}."
        questions.setdefault(items, []).append(Question(text, "; ".join(rows)))
    rng.shuffle(lines)
    return Facts(lines, _long_ones(questions, LIST_ITEMS))


def _records(rng: random.Random, count: int) -> Facts:
    """Tours whose stops name their neighbours; the answer has all stops of one, in either order."""
    lines: list[Fact] = []
    questions: dict[int, list[Question]] = {}
    names = iter(rng.sample(NOUNS, len(NOUNS)))
    for stops in _sizes(rng, min(count, len(NOUNS)), TOUR_STOPS, len(NOUNS)):
        tour = [next(names) for _ in range(stops)]
        records: list[Fact] = [
            (
                f"name: {name}; inspector:",
                f" {rng.choice(NAMES)}",
                "; badge: ",
                draw_number(rng, 3),
                "; north:",
                f" {north}",
                "; south:",
                f" {south}",
                "\n",
            )
            for name, north, south in zip(
                tour, [*tour[1:], "nothing"], ["nothing", *tour[:-1]], strict=True
            )
        ]
        lines += records
        for order, start, way in ((records, 0, "north"), (records[::-1], -1, "south")):
            text = f"List the records from {tour[start]} to the {way}."
            answer = "".join("".join(record) for record in order).removesuffix("\n")
            questions.setdefault(stops, []).append(Question(text, answer))
    rng.shuffle(lines)
    return Facts(lines, _long_ones(questions, TOUR_STOPS))


def _sum(rng: random.Random, count: int) -> Facts:
    """Amounts; the answer writes two of them and their sum, whose carries run over many digits."""
    pairs = max(1, count // 2)
    keys = draw_keys(rng, 2 * pairs)
    lines, questions = [], []
    for first, second in zip(keys[::2], keys[1::2], strict=True):
        # Both begin with 5 or more, so that all sums are as long.
        a = [rng.randint(5, 9)] + [rng.randrange(10) for _ in range(ADDEND_DIGITS - 1)]
        b = [rng.randint(5, 9)] + [
            9 - digit if rng.random() < LONG_CARRIES else rng.randrange(10) for digit in a[1:]
        ]
        left, right = ("".join(map(str, digits)) for digits in (a, b))
        lines += [fact_line("amount", first, left), fact_line("amount", second, right)]
        text = f"What is the sum of {first} and {second}?"
        questions.append(Question(text, f"{left} + {right} = {int(left) + int(right)}"))
    rng.shuffle(lines)
    return Facts(lines, questions)


def _two_readings(rng: random.Random, count: int) -> Facts:
    """Badges of the same people in several places; the answer says which place, then the badge."""
    places, people = max(2, isqrt(count // 2)), max(1, isqrt(count // 2))
    where = rng.sample(NOUNS, places)
    names = rng.sample(NAMES, people)
    badges = dict(
        zip(
            [(name, place) for name in names for place in where],
            draw_numbers(rng, people * places),
            strict=True,
        )
    )
    lines = [fact_line("badge", f"{name} in {place}", n) for (name, place), n in badges.items()]
    questions = []
    for key in draw_keys(rng, max(2, count - len(badges))):
        place = rng.choice(where)
        lines.append(fact_line("place", key, place))
        name = rng.choice(names)
        text = f"Where is {key}, and which badge has {name} there?"
        questions.append(Question(text, f"{place}: {badges[name, place]}"))
    rng.shuffle(lines)
    return Facts(lines, questions)


def _sizes(rng: random.Random, count: int, limits: tuple[int, int], most: int) -> list[int]:
    """Sizes of groups with `count` members in all; the last one may be smaller than the limits."""
    sizes: list[int] = []
    while count and len(sizes) < most:
        sizes.append(min(count, rng.randint(*limits)))
        count -= sizes[-1]
    return sizes


def _long_ones(questions: dict[int, list[Question]], limits: tuple[int, int]) -> list[Question]:
    """Those about groups within the limits; about the largest where there is none."""
    least = min(limits[0], max(questions))
    return [q for size, asked in questions.items() if size >= least for q in asked]


DEPENDENT_TASKS: Final[dict[str, Callable[[random.Random, int], Facts]]] = {
    "chain": _chain,
    "ledger": _ledger,
    "sorted_list": _sorted_list,
    "records": _records,
    "sum": _sum,
    "two_readings": _two_readings,
}
