"""Batches of masked conversations, and the curriculum that chooses them."""

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from small_model.tasks import Limits, make_document
from small_model.training.batches import batch_source
from small_model.training.curriculum import STAGES, Curriculum
from small_model.training.data import (
    LAST_GAP,
    PADDING_WEIGHT,
    SMALLEST_RATIO,
    TASK_NAMES,
    Batch,
    Encoder,
    Stage,
    make_batch,
)
from small_model.training.states import BLOCK
from small_model.training.tokenizer import training_text

KEYS = Stage(4, 256, False, 0.5, (("multi_key", 1.0),))
MIXED = Stage(16, 1024, True, 0.5, STAGES[-1].weights)
EACH_STAGE = pytest.mark.parametrize("stage", [KEYS, MIXED], ids=["keys", "mixed"])


def whole(batch: Batch) -> np.ndarray:
    """The batch with its answers filled in."""
    tokens = batch.tokens.copy()
    tokens.reshape(-1)[batch.positions] = batch.targets
    return tokens


def answers_and_padding(encoder: Encoder, batch: Batch) -> list[np.ndarray]:
    """Places in the flattened batch between the header of an answer and the next turn."""
    flat, header, user = whole(batch).reshape(-1).tolist(), list(encoder.assistant), encoder.user
    spans, start = [], None
    for place in range(len(flat)):
        if flat[place - len(header) : place] == header:
            start = place
        ends = flat[place] == encoder.start or tuple(flat[place : place + len(user)]) == user
        if start is not None and (ends or place == len(flat) - 1):
            spans.append(np.arange(start, place + 1))
            start = None
    return spans


@EACH_STAGE
def test_only_answers_are_masked(encoder: Encoder, stage: Stage) -> None:
    batch = make_batch(encoder, 0, 1, stage, 8)
    assert batch.tokens.shape == (8, stage.length)
    assert np.array_equal(
        np.flatnonzero(batch.tokens.reshape(-1) == encoder.mask), np.sort(batch.positions)
    )
    rows = whole(batch)
    assert encoder.mask not in rows
    header = list(encoder.assistant)
    (line_break,) = encoder.encode("\n")
    for row, seen in zip(rows, batch.tokens, strict=True):
        answer, lines = False, []
        for place, token in enumerate(row):
            if row[place - len(header) : place].tolist() == header:
                answer = True
            # A turn of the user ends an answer and its padding.
            if row[place : place + len(encoder.user)].tolist() == list(encoder.user):
                answer, line_start = False, place + len(encoder.user)
            if not answer and seen[place] != token:
                # Only a line that stands in the document a second time.
                line_start = place
                while row[line_start - 1] != line_break:
                    line_start -= 1
                line = row[line_start : line_start + row[line_start:].tolist().index(line_break)]
                lines.append(encoder._tokenizer.decode(line.tolist()) + "\n")
        document = encoder._tokenizer.decode(row.tolist())
        assert all(document.count(line) >= 2 for line in lines)


@EACH_STAGE
def test_a_conversation_reads_as_the_chat_template_writes_it(
    encoder: Encoder, tokenizer_folder: Path, stage: Stage
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for row in whole(make_batch(encoder, 0, 2, stage, 8)).tolist():
        text = tokenizer.decode(row).replace("<|endoftext|>", "")
        turns = text.removeprefix("<|startoftext|>").split("<|eot_id|>")
        assert turns.pop() == ""
        messages = [
            dict(zip(("role", "content"), turn[19:].split("<|end_header_id|>\n\n"), strict=True))
            for turn in turns
        ]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert [token for token in row if token != encoder.end] == ids


def test_weights_are_one_over_the_ratio(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their answers weigh more.
    monkeypatch.setattr("small_model.training.data.SINGLE_QUESTION", 0.0)
    # As LLaDA masks, not as a block shows its state.
    monkeypatch.setattr("small_model.training.states.UNIFORM", 1.0)
    sums = [make_batch(encoder, 0, step, KEYS, 16).weights.sum() for step in range(40)]
    assert np.mean(sums) == pytest.approx(1.0, abs=0.05)
    batch = make_batch(encoder, 0, 0, KEYS, 16)
    scaled = np.unique(batch.weights[batch.questions >= 0])
    assert len(scaled) == 1  # ratio 1, and no padding among them
    of_answers = np.isin(batch.positions, np.concatenate(answers_and_padding(encoder, batch)))
    relative = batch.weights[of_answers] / scaled[0]
    # All padding of an answer weighs no more than half of its nine tokens.
    assert PADDING_WEIGHT * 9 / (BLOCK + LAST_GAP) <= relative.min() < PADDING_WEIGHT
    assert relative.max() <= 1 / SMALLEST_RATIO + 1e-4


def test_fully_masked_questions_are_whole(encoder: Encoder) -> None:
    batch = make_batch(encoder, 0, 3, KEYS, 16)
    asked = np.unique(batch.questions)
    assert asked.tolist() == list(range(-1, len(batch.question_tasks)))
    assert set(batch.question_tasks) == {TASK_NAMES.index("multi_key")}
    for question in asked[1:]:
        targets = batch.targets[batch.questions == question]
        # Eight digits and the end of the turn.
        assert targets[-1] == encoder.turn_end
        assert len(targets) == 9
        places = batch.positions[batch.questions == question]
        assert np.array_equal(places, np.arange(places[0], places[0] + 9))


def test_batches_repeat(encoder: Encoder) -> None:
    first, again, other = (make_batch(encoder, 7, step, MIXED, 2) for step in (4, 4, 5))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.tokens, other.tokens)


def test_documents_are_those_of_the_training_split(encoder: Encoder) -> None:
    """Keys and codes of held-out documents do not turn up together."""
    held_out = {
        line
        for split in ("validation", "test")
        for seed in range(50)
        for line in make_document(
            "multi_key", split, seed, Limits(256, encoder.count, asked=None, filler=False)
        ).lines
    }
    batch = make_batch(encoder, 0, 0, KEYS, 64)
    text = "".join(
        encoder._tokenizer.decode(row.tolist(), skip_special_tokens=False) for row in whole(batch)
    )
    assert "The access code of the " in text
    assert not any(line in text for line in held_out)


def test_workers_make_the_same_batches(
    encoder: Encoder, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curriculum = Curriculum((KEYS, MIXED))
    with batch_source(0, 1024, tokenizer_folder, 1) as source:
        assert isinstance(source._pool, ProcessPoolExecutor)
        for step in range(4):
            # A change of stage makes what was begun useless.
            curriculum.stage = step // 2
            index = curriculum.stage_of(0, step)
            stage = curriculum.stages[index]
            expected = make_batch(encoder, 0, step, stage, 1024 // stage.length)
            assert np.array_equal(source.batch(curriculum, step).tokens, expected.tokens)


def counts(**of: int) -> list[int]:
    return [of.get(name, 0) for name in TASK_NAMES]


@pytest.mark.parametrize(
    ("stage", "step", "correct", "verdict", "after"),
    [
        (0, 100, 290, "exact match 0.967", 1),
        (0, 100, 240, None, 0),
        (0, 1500, 0, "exact match 0.000, out of patience", 1),
        (2, 1500, 0, "exact match 0.000, out of patience", 3),
        (2, 1499, 0, None, 2),
        (2, 100, 290, "exact match 0.967", 3),
        (len(STAGES) - 1, 100, 300, None, len(STAGES) - 1),
    ],
    ids=[
        "passed",
        "at-the-threshold",
        "first-stage-late",
        "late",
        "not-late",
        "every-task-passes",
        "last-stage",
    ],
)
def test_moves_on(stage: int, step: int, correct: int, verdict: str | None, after: int) -> None:
    curriculum = Curriculum(STAGES, stage)
    asked = {name: 300 for name, _ in STAGES[stage].weights}
    right = dict(asked) if stage else {}
    curriculum.add(counts(**right | {"multi_key": correct}), counts(**asked))
    assert curriculum.verdict(step) == verdict
    assert curriculum.stage == after
    assert curriculum.exact_match() == {}


def test_waits_for_enough_answers() -> None:
    curriculum = Curriculum(STAGES)
    right = counts(multi_key=20)
    curriculum.add(right, right)
    assert curriculum.verdict(40) is None
    assert curriculum.exact_match() == {"multi_key": 1.0}
    curriculum.add(right, right)
    assert curriculum.verdict(60) is not None


def test_earlier_stages_stay_in_the_mix() -> None:
    curriculum = Curriculum(STAGES, 6)
    drawn = np.bincount([curriculum.stage_of(0, step) for step in range(6000)], minlength=10) / 6000
    assert drawn[6] == pytest.approx(0.5, abs=0.02)
    assert drawn[4:6].sum() == pytest.approx(0.25 + 0.25 * 2 / 6, abs=0.02)
    assert (drawn[:4] > 0.01).all()
    assert (drawn[7:] == 0).all()


def test_encodes_as_the_tokenizer(encoder: Encoder) -> None:
    for text in training_text(3):
        whole = encoder._tokenizer.encode(text, add_special_tokens=False).ids
        assert list(encoder.encode(text)) == whole


def test_forms_of_words(encoder: Encoder) -> None:
    forms = dict(encoder.forms)
    assert len(forms) > 400
    word = encoder._tokenizer.token_to_id("Yara")
    assert encoder._tokenizer.decode([forms[word]]) == " Yara"
    assert encoder.mask not in forms
