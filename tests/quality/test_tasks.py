"""Documents: their size, their answers, and that they repeat themselves only when asked to."""

import re
from collections import Counter

import pytest

from benchmarks.quality.tasks import (
    COMMON_WORDS,
    SPLITS,
    TASKS,
    Document,
    Limits,
    is_correct,
    make_document,
)

EACH_TASK = pytest.mark.parametrize("task", TASKS)


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
        assert len(document.questions) > 5
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
    lines = document.lines
    key = " ".join(question.rstrip("?").split()[-2:])
    if document.task in ("single_needle", "multi_key"):
        (line,) = (x for x in lines if f"access code of the {key} is" in x)
        return line.split()[-1].rstrip(".")
    if document.task == "multi_value":
        found = re.search(r"does the (.*) have", question)
        assert found
        start = f"The {found[1]} has the call number "
        return ", ".join(x.removeprefix(start)[:5] for x in lines if x.startswith(start))
    if document.task == "variable_tracking":
        value = question.split()[-1].rstrip("?")
        holders: list[str] = []
        for line in lines:
            found = re.fullmatch(r"Variable (\w+) is (?:a copy of )?(\w+)\.\n", line)
            if found and (found[2] == value or found[2] in holders):
                holders.append(found[1])
        return ", ".join(holders)
    if document.task == "common_words":
        counts = Counter(document.text.split()).most_common(COMMON_WORDS + 1)
        assert counts[COMMON_WORDS - 1][1] >= 7 * counts[COMMON_WORDS][1]
        return ", ".join(word for word, _ in counts[:COMMON_WORDS])
    (line,) = (x for x in lines if x.startswith(f"Report on the {report_key(question)}:"))
    for asked, pattern in (
        ("inspected", r"inspected by (\w+)"),
        ("status", r"status (\w+)"),
        ("pressure", r"pressure (\d+)"),
        ("visit", r"next visit in (\w+)"),
    ):
        if asked in question:
            found = re.search(pattern, line)
            assert found
            return found[1]
    raise AssertionError(question)


def report_key(question: str) -> str:
    return " ".join(question.rstrip("?").split()[-2:])


@EACH_TASK
@pytest.mark.parametrize("filler", [True, False], ids=["filler", "facts-only"])
def test_answers_follow_from_the_document(task: str, filler: bool) -> None:
    for seed in range(10):
        document = make_document(task, "test", seed, limits(2048, asked=None, filler=filler))
        for question in document.questions:
            assert is_correct(expected_answer(document, question.text), question.answer)


def test_facts_can_be_few() -> None:
    document = make_document("multi_key", "train", 0, limits(asked=None, facts=3, filler=False))
    assert len(document.lines) == len(document.questions) == 3


@pytest.mark.parametrize(
    ("answer", "right"),
    [("41107", True), (" 41107\n", True), ("41108", False), ("41107 .", False), ("", False)],
    ids=["same", "white-space", "other-digit", "more", "nothing"],
)
def test_scores_exact_matches(answer: str, right: bool) -> None:
    assert is_correct(answer, "41107") is right


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
