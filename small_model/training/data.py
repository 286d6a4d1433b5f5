"""Batches of masked conversations: many questions about one document, answers to be filled in.

Some facts of a document are said again at its end, with their values to be filled in too.

A batch is a function of (seed, step, stage) alone, so that workers can make it ahead of time and a
resumed training sees the same ones. Nothing here needs PyTorch.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from small_model.tasks import (
    DEPENDENT_TASKS,
    TASKS,
    Document,
    Limits,
    canvas_of,
    make_document,
)
from small_model.training.states import BLOCK, draw_state, uniform_state
from small_model.training.tokenizer import END, HEADER_END, HEADER_START, MASK, START, TURN_END

LONGEST_GAP: Final = 4  # padding after any answer but that of a single question
LAST_GAP: Final = 24  # tokens at the end of a sequence up to which a canvas may be extended
CANVASES: Final = (32, 64, 128, 256, 512)  # tokens of the answer to a single question
LARGER_CANVAS: Final = 0.25  # share of the single questions with another canvas than in use
SINGLE_QUESTION: Final = 0.3  # share of the documents with one question, as in use
SMALLEST_RATIO: Final = 0.1  # of masked values that are said again
FULL_WEIGHT: Final = 64  # tokens: of a longer answer all together weigh no more than of such a one
# One answer fills the room of many: with more, few facts would be left.
ASKED: Final = {"records": 1}
FEW_FIELDS: Final = 0.5  # share of the other reports of which not every field is asked for
# Of the padding after an answer, an answer's token having 1; all of it weighs no more than so much
# of the answer.
PADDING_WEIGHT: Final = 0.5
# Of an answer, others having 1: a list has one question of one word, others dozens of numbers.
TASK_WEIGHTS: Final = {"common_words": 4.0, "sum": 1.5, "ledger": 1.5}
TASK_NAMES: Final = tuple(TASKS)
NEXT_TOKEN_COUNTS: Final = tuple(DEPENDENT_TASKS)
"""Tasks of which the next token is counted: fully masked answers are not meant to be right."""
# What the tokenizer splits ASCII text into before BPE, `_PIECES` of tokenizer.py.
_ASCII_PIECES: Final = re.compile(r"[0-9]|\n+| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s")
FACTS_FOR_ONE: Final = {"multi_key": 1}  # of a stage; others: 2
_LONG_BY_NATURE: Final = ("single_needle", "common_words")  # filled up in every stage


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the curriculum.

    Attributes:
        facts: per document, at most.
        length: tokens of a sequence.
        filler: whether sentences without facts fill the rest.
        restated: share of the facts that a document with several questions says twice, the second
            time with values to fill in: what surrounds these is then the same in both places, so
            that equal words are learnt to match.
        weights: share of each task.
        patience: steps after which the stage is left in any case; None: it is not.
        batch_tokens: tokens of a batch; None: as the training says.
    """

    facts: int
    length: int
    filler: bool
    restated: float
    weights: tuple[tuple[str, float], ...]
    patience: int | None = None
    batch_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences and what has to be predicted in them.

    Attributes:
        tokens: int64 [sequences, length], answers masked.
        positions: int64 [masked], index into `tokens` flattened.
        targets: int64 [masked].
        weights: float32 [masked], 1/t, less for padding, long answers and documents with many
            questions; sums to about 1 over a batch.
        questions: int64 [masked], which counted question the position answers: all tokens of a
            fully masked answer, or the next one of an answer that builds on itself; -1: none.
        question_tasks: int64 [counted questions], index into `TASK_NAMES`.
    """

    tokens: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]
    questions: npt.NDArray[np.int64]
    question_tasks: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Answer:
    """Where an answer lies: its tokens with the end of turn, then padding that is learnt too.

    Attributes:
        task: index into `TASK_NAMES`; None: a value of a restated fact, which counts for no task.
        weight: of each of its tokens. Long answers and documents with many questions have more
            tokens: by the root of both, lest the other tasks be drowned.
    """

    start: int
    stop: int
    padding_stop: int
    task: int | None
    weight: float


def forms_of_words(vocabulary: Mapping[str, int]) -> list[tuple[int, int]]:
    """Tokens of each word alone and after a space, in the order of a byte-level vocabulary."""
    space = "\u0120"  # how byte-level BPE writes one
    return [
        (token, vocabulary[space + text])
        for text, token in sorted(vocabulary.items(), key=lambda item: item[1])
        if text.isascii() and text.isalpha() and space + text in vocabulary
    ]


class Encoder:
    """The tokenizer with a memory: of lines, and of the pieces that BPE does not cross."""

    def __init__(self, folder: Path) -> None:
        """Read tokenizer.json of a folder."""
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.forms = forms_of_words(self._tokenizer.get_vocab())
        self._pieces: dict[str, tuple[int, ...]] = {}
        self.encode = lru_cache(maxsize=20_000)(self._encode)
        self.mask, self.start, self.end, self.turn_end = (
            self._special(token) for token in (MASK, START, END, TURN_END)
        )
        self.user, self.assistant = (
            self._tokenize(f"{HEADER_START}{role}{HEADER_END}\n\n")
            for role in ("user", "assistant")
        )

    def _special(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer has no {token}")
        return int(number)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode(self, text: str) -> tuple[int, ...]:
        """Tokens of ASCII text without special tokens; several times as fast as the tokenizer."""
        ids: list[int] = []
        known = self._pieces
        for piece in _ASCII_PIECES.findall(text):
            if piece not in known:
                known[piece] = self._tokenize(piece)
            ids += known[piece]
        return tuple(ids)

    def decode(self, ids: list[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def count(self, text: str) -> int:
        return len(self.encode(text))


def make_batch(encoder: Encoder, seed: int, step: int, stage: Stage, sequences: int) -> Batch:
    """The batch of one step."""
    rng = random.Random(f"batch/{seed}/{step}/{stage.facts}/{stage.length}")
    tokens = np.full((sequences, stage.length), encoder.end, dtype=np.int64)
    answers: list[tuple[int, _Answer]] = []
    for row in range(sequences):
        ids, spans = _conversation(encoder, rng, stage)
        tokens[row, : len(ids)] = ids
        answers += [(row * stage.length, span) for span in spans]
    return _masked(rng, encoder.mask, tokens, answers)


def _document(encoder: Encoder, rng: random.Random, stage: Stage) -> tuple[Document, int | None]:
    """A document, and the canvas of its single answer; None: as long as the answer."""
    names, weights = zip(*stage.weights, strict=True)
    task = rng.choices(names, weights)[0]
    facts = stage.facts
    if stage.filler:
        facts = rng.randint(-(-facts // 2), facts)
    else:
        # What takes less room in a document, or needs several lines for an answer, gets more lines.
        facts *= FACTS_FOR_ONE.get(task, 2)
    turn = len(encoder.user) + len(encoder.assistant) + 2 + LONGEST_GAP
    asked, restated, canvas = ASKED.get(task), stage.restated, None
    if rng.random() < SINGLE_QUESTION:
        asked, restated = 1, 0.0
        sizes = [canvas_of(task)]
        if rng.random() < LARGER_CANVAS:
            sizes = [size for size in CANVASES if size > sizes[0]] or sizes
        canvas = rng.choice(sizes)
        if canvas > stage.length // 2:
            canvas = None
    elif task == "report" and rng.random() < FEW_FIELDS:
        # About one of a record's four: more records fit.
        asked = max(1, facts // 2)
    limits = Limits(
        # What the last answer's canvas may take beside the answer.
        tokens=stage.length - 1 - (BLOCK if canvas is None else 0),
        count=encoder.count,
        turn_overhead=turn,
        asked=asked,
        facts=facts,
        filler=stage.filler or task in _LONG_BY_NATURE,
        restated=restated,
        canvas=canvas,
    )
    return make_document(task, "train", rng.getrandbits(62), limits), canvas


def _conversation(
    encoder: Encoder, rng: random.Random, stage: Stage
) -> tuple[list[int], list[_Answer]]:
    document, canvas = _document(encoder, rng, stage)
    task = TASK_NAMES.index(document.task)
    ids = [encoder.start, *encoder.user]
    for line in document.lines:
        ids += encoder.encode(line)
    spans = []
    for fact in document.restated:
        for place, part in enumerate(fact):
            start = len(ids)
            ids += encoder.encode(part)
            if place % 2:
                values = sum(len(restated) // 2 for restated in document.restated)
                weight = ((len(ids) - start) * values) ** -0.5
                spans.append(_Answer(start, len(ids), len(ids), None, weight))
    for number, question in enumerate(document.questions):
        if number:
            ids += encoder.user
        ids += [*encoder.encode(question.text), encoder.turn_end, *encoder.assistant]
        start = len(ids)
        ids += [*encoder.encode(question.answer), encoder.turn_end]
        stop = len(ids)
        padding = rng.randint(0, LONGEST_GAP)
        if canvas is not None:
            padding = start + canvas - stop
        elif number == len(document.questions) - 1:
            padding = (start - stop) % BLOCK
        left = stage.length - stop - padding
        if number == len(document.questions) - 1 and left <= LAST_GAP and rng.random() < 0.7:
            # As in use, nothing comes after the canvas.
            padding += left
        ids += [encoder.end] * padding
        length = stop - start
        weight = min(length, FULL_WEIGHT) ** 0.5 / length / len(document.questions) ** 0.5
        weight *= TASK_WEIGHTS.get(document.task, 1.0)
        spans.append(_Answer(start, stop, len(ids), task, weight))
    return ids, spans


def _masked(
    rng: random.Random,
    mask: int,
    tokens: npt.NDArray[np.int64],
    answers: list[tuple[int, _Answer]],
) -> Batch:
    """Mask each answer in its own state."""
    generator = np.random.default_rng(rng.getrandbits(62))
    flat = tokens.reshape(-1)
    positions, weights, questions = [], [], []
    question_tasks: list[int] = []
    total = 0.0
    for offset, span in answers:
        length, all_tokens = span.stop - span.start, span.padding_stop - span.start
        if span.task is None:
            ratio = rng.uniform(SMALLEST_RATIO, 1.0)
            state = uniform_state(generator, length, all_tokens, ratio, False)
        else:
            dependent = TASK_NAMES[span.task] in NEXT_TOKEN_COUNTS
            state = draw_state(rng, generator, length, all_tokens, dependent)
        places = np.arange(all_tokens)
        padding = PADDING_WEIGHT * min(1.0, length / max(1, all_tokens - length))
        base = span.weight * np.where(places < length, 1.0, padding)
        total += float(base.sum())
        question = np.full(all_tokens, -1)
        if span.task is not None and state.counted.any():
            question[state.counted] = len(question_tasks)
            question_tasks.append(span.task)
        hidden = state.hidden
        positions.append(offset + span.start + places[hidden])
        weights.append((base * state.factors)[hidden])
        questions.append(question[hidden])
    joined = np.concatenate(positions)
    targets = flat[joined].copy()
    flat[joined] = mask
    return Batch(
        tokens=tokens,
        positions=joined,
        targets=targets,
        weights=(np.concatenate(weights) / total).astype(np.float32),
        questions=np.concatenate(questions).astype(np.int64),
        question_tasks=np.array(question_tasks, dtype=np.int64),
    )
