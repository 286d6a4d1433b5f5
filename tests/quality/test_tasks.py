"""Documents: their size, their answers, and that they repeat themselves only when asked to."""

import re
from collections import Counter

import pytest

from small_model.tasks import (
    DEPENDENT_TASKS,
    LINE_TASKS,
    SPLITS,
    TASKS,
    Document,
    Limits,
    canvas_of,
    is_correct,
    make_document,
    right_lines,
)
from small_model.words import MONTHS

EACH_TASK = pytest.mark.parametrize("task", TASKS)


QUESTIONS = {
    "chain": r"Follow the value of (\w+)\.",
    "ledger": r"What did (\w+) pay until (\w+), with totals\?",
    "sorted_list": r"List the trips of (\w+) by month until (\w+)\.",
    "records": r"List the records from (\w+) to the (north|south)\.",
    "sum": r"What is the sum of (.+) and (.+)\?",
    "two_readings": r"Where is (.+), and which badge has (\w+) there\?",
}


def count_words(text: str) -> int:
    """A tokenizer of sorts: words, and each digit, mark and line break."""
    return len(re.findall(r"[A-Za-z]+|\S|\n", text))


def limits(tokens: int = 1024, **changes: object) -> Limits:
    return Limits(tokens=tokens, count=count_words, **changes)  # type: ignore[arg-type]


@EACH_TASK
@pytest.mark.parametrize("tokens", [256, 700, 1024, 4096, 8192], ids=str)
def test_fills_the_length_and_no_more(task: str, tokens: int) -> None:
    document = make_document(task, "test", 0, limits(tokens, turn_overhead=40))
    question = document.questions[0]
    used = count_words(document.prompt(question)) + count_words(question.answer) + 40
    assert tokens * 0.8 - 40 <= used <= tokens


@EACH_TASK
def test_all_questions_fit_too(task: str) -> None:
    document = make_document(task, "train", 3, limits(3000, turn_overhead=16, asked=None))
    used = count_words(document.text) + sum(
        count_words(q.text) + count_words(q.answer) + 16 for q in document.questions
    )
    assert used <= 3000
    if task not in ("single_needle", "common_words"):
        assert len(document.questions) >= (2 if task == "records" else 5)
        assert len({q.text for q in document.questions}) == len(document.questions)


@EACH_TASK
def test_depends_on_its_arguments_alone(task: str) -> None:
    first = make_document(task, "test", 5, limits())
    assert first == make_document(task, "test", 5, limits())
    assert first.text != make_document(task, "test", 6, limits()).text


@EACH_TASK
def test_splits_share_no_document(task: str) -> None:
    texts = {
        split: {make_document(task, split, seed, limits(512)).text for seed in range(20)}
        for split in SPLITS
    }
    assert all(len(found) == 20 for found in texts.values())
    assert len(set.union(*texts.values())) == 20 * len(SPLITS)


def expected_answer(document: Document, question: str) -> str:
    """The answer, found by reading the document."""
    found = {}
    for line in document.lines:
        fact = re.fullmatch(r"The (.+?) of (.+) is (that of )?(\w.*)\.\n", line)
        if fact:
            found.setdefault((fact[1], fact[2]), []).append((fact[3] is not None, fact[4]))
    if document.task == "common_words":
        (best, often), (_, next_often) = Counter(document.text.split()).most_common(2)
        assert often >= 10 * next_often
        return best
    if document.task == "multi_value":
        key = question.removeprefix("What are the call numbers of ").removesuffix("?")
        return ", ".join(value for _, value in found["call number", key])
    if document.task in DEPENDENT_TASKS:
        values = {key: value for key, ((_, value), *_) in found.items()}
        return dependent_answer(
            document, question, values, {k for k, v in found.items() if v[0][0]}
        )
    asked = re.fullmatch(r"What is the (.+?) of (.+)\?", question)
    assert asked
    ((is_copy, value),) = found[asked[1], asked[2]]
    while is_copy:
        ((is_copy, value),) = found["value", value]
    return value


def dependent_answer(
    document: Document,
    question: str,
    values: dict[tuple[str, str], str],
    copies: set[tuple[str, str]],
) -> str:
    """Step by step, from facts by what they say of which key, and which are copies."""
    asked = re.fullmatch(QUESTIONS[document.task], question)
    assert asked
    match document.task:
        case "chain":
            way = [asked[1]]
            while ("value", way[-1]) in copies:
                way.append(values["value", way[-1]])
            return f"{' -> '.join(way)}: {values['value', way[-1]]}"
        case "ledger":
            rows, total = [], 0
            for month in MONTHS[: MONTHS.index(asked[2]) + 1]:
                amount = values["payment", f"{asked[1]} in {month}"]
                total += int(amount)
                rows.append(f"{month} {amount} {total:03d}")
            return "\n".join(rows)
        case "sorted_list":
            goals = {month: values.get(("trip", f"{asked[1]} in {month}")) for month in MONTHS}
            assert [month for month in MONTHS if goals[month]][-1] == asked[2]
            return "; ".join(f"{month} {goal}" for month, goal in goals.items() if goal)
        case "records":
            records = {line.split("; ")[0]: line for line in document.lines if "; north: " in line}
            name, listed = asked[1], []
            while name != "nothing":
                listed.append(records[f"name: {name}"])
                neighbour = re.search(rf"{asked[2]}: (\w+)", listed[-1])
                assert neighbour
                name = neighbour[1]
            return "".join(listed)
        case "sum":
            left, right = values["amount", asked[1]], values["amount", asked[2]]
            return f"{left} + {right} = {int(left) + int(right)}"
        case _:
            place = values["place", asked[1]]
            return f"{place}: {values['badge', f'{asked[2]} in {place}']}"


@EACH_TASK
def test_chains_and_several_values_occur(task: str) -> None:
    document = make_document(task, "test", 0, limits(2048, asked=None))
    copies = sum("is that of" in line for line in document.lines)
    assert (copies >= 8) == (task in ("variable_tracking", "chain"))
    assert any("," in q.answer for q in document.questions) == (task == "multi_value")


@EACH_TASK
@pytest.mark.parametrize("filler", [True, False], ids=["filler", "facts-only"])
def test_answers_follow_from_the_document(task: str, filler: bool) -> None:
    for seed in range(10):
        document = make_document(task, "test", seed, limits(2048, asked=None, filler=filler))
        for question in document.questions:
            assert is_correct(expected_answer(document, question.text), question.answer)


@EACH_TASK
def test_restated_facts_are_lines_of_the_document(task: str) -> None:
    document = make_document(task, "train", 1, limits(2048, asked=None, restated=0.5, filler=False))
    texts = ["".join(fact) for fact in document.restated]
    assert set(texts) <= set(document.lines)
    facts = {"multi_value": 0, "common_words": 0}.get(task, len(document.lines))
    assert len(texts) == len(set(texts)) == facts // 2
    values = [fact[1::2] for fact in document.restated]
    assert all(re.fullmatch(r" ?\w[\w .:]*\w", value) for line in values for value in line)
    # What is not a value tells the fact from all others.
    assert len({fact[::2] for fact in document.restated}) == len(texts)
    used = count_words(document.text + "".join(texts)) + sum(
        count_words(q.text) + count_words(q.answer) for q in document.questions
    )
    assert used <= 2048


@pytest.mark.parametrize("task", LINE_TASKS)
def test_long_answers_are_long_and_fit_their_canvas(task: str) -> None:
    least = {"ledger": 6, "sorted_list": 6, "records": 12}[task]
    for seed in range(20):
        document = make_document(task, "test", seed, limits(1024, canvas=canvas_of(task)))
        (question,) = document.questions
        assert len(re.findall(r"[\n;] ?(?=[A-Z]|name)", question.answer)) + 1 >= least
        assert count_words(question.answer) < canvas_of(task)


def test_share_of_right_lines() -> None:
    assert right_lines("May 1 001\nJune 2 003", "May 1 001\nJune 3 004") == 0.5
    assert right_lines("May fox; June owl; July oak", "May fox; June owl") == pytest.approx(2 / 3)
    assert right_lines("", "May fox; June owl") == 0.0
    assert right_lines(" May fox;  June owl\n", "May fox; June owl") == 1.0


def test_facts_can_be_few() -> None:
    document = make_document("multi_key", "train", 0, limits(asked=None, facts=3, filler=False))
    assert len(document.lines) == len(document.questions) == 3


@pytest.mark.parametrize(
    ("answer", "right"),
    [("4110", True), (" 4110\n", True), ("4111", False), ("4110 .", False), ("", False)],
    ids=["same", "white-space", "other-digit", "more", "nothing"],
)
def test_scores_exact_matches(answer: str, right: bool) -> None:
    assert is_correct(answer, "4110") is right


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("oak, fox", True),
        ("fox,oak", True),
        ("fox, fox", False),
        ("fox", False),
        ("fox oak", False),
    ],
    ids=["other-order", "white-space", "twice", "one-missing", "no-comma"],
)
def test_lists_have_no_order(answer: str, right: bool) -> None:
    assert is_correct(answer, "fox, oak") is right


@pytest.mark.parametrize(
    ("task", "split", "tokens", "message"),
    [
        ("needles", "test", 512, "task='needles'"),
        ("report", "holdout", 512, "split='holdout'"),
        ("report", "test", 12, "12 tokens are too few"),
    ],
    ids=["task", "split", "length"],
)
def test_refuses_what_cannot_be(task: str, split: str, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_document(task, split, 0, limits(tokens))
