"""Ask a model about held-out documents in a plain PyTorch loop, at several tokens a pass.

    python -m small_model.training.evaluation MODEL --lengths 1024 4096 --documents 100

The rules are the server's for `low_confidence` at temperature 0: blocks of 32, the most confident
masks of the block first, a fixed number of them a pass. Documents that are a few tokens shorter
than others begin with part of a sentence more, so that they can be asked together.
"""

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from small_model.tasks import (
    LINE_TASKS,
    TASKS,
    Limits,
    canvas_of,
    is_correct,
    make_document,
    right_lines,
)
from small_model.training.data import Encoder
from small_model.training.model import Model, Shape
from small_model.training.states import BLOCK

ALL_AT_ONCE: Final = 0
"""In place of a number of tokens a pass: the whole canvas in one."""

MOST_TOKENS: Final = 2**18  # of a batch
_FILLING: Final = "The wind turned, and the lamp looked calm in the light.\n"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as tokens.

    Attributes:
        canvas: tokens of the answer.
    """

    task: str
    prompt: tuple[int, ...]
    canvas: int
    answer: str


@dataclass(slots=True)
class Score:
    """Of one task, length and pace."""

    asked: int = 0
    right: int = 0
    lines: float = 0.0
    passes: int = 0
    tokens: int = 0
    wrong: tuple[str, str] | None = None  # the last wrong answer, and the right one

    def row(self) -> dict[str, float]:
        return {
            "asked": self.asked,
            "exact_match": self.right / self.asked,
            "right_lines": self.lines / self.asked,
            "passes": self.passes / self.asked,
            "tokens_per_pass": self.tokens / self.passes,
        }


def ask_documents(
    encoder: Encoder, tasks: Iterable[str], length: int, seeds: Iterable[int], split: str
) -> list[Asked]:
    """One question about each document; prompt and canvas fill `length`."""
    asked = []
    seeds = list(seeds)
    for task in tasks:
        canvas = canvas_of(task)
        overhead = 2 + len(encoder.user) + len(encoder.assistant)
        limits = Limits(length, encoder.count, overhead, canvas=canvas)
        for seed in seeds:
            document = make_document(task, split, seed, limits)
            (question,) = document.questions
            ids = [encoder.start, *encoder.user]
            for line in document.lines:
                ids += encoder.encode(line)
            ids += [*encoder.encode(question.text), encoder.turn_end, *encoder.assistant]
            asked.append(Asked(task, tuple(ids), canvas, question.answer))
    return asked


@torch.inference_mode()
def fill_in(
    model: Model, prompts: Tensor, canvas: int, per_pass: int, mask: int, ends: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide the answers of prompts of one length.

    Args:
        model: on the device of the prompts.
        prompts: int64 [requests, tokens].
        canvas: tokens of every answer.
        per_pass: tokens decided in a pass; 0: all of them in one.
        mask: token of an undecided position.
        ends: tokens with which an answer ends; what follows the first is not decided any more.

    Returns:
        int64 [requests, canvas]; int64 [requests], passes; int64 [requests], tokens decided in
        them.
    """
    device = prompts.device
    requests, length = prompts.shape
    tokens = torch.cat((prompts, prompts.new_full((requests, canvas), mask)), dim=1)
    answer = tokens[:, length:]
    passes, decided = (torch.zeros(requests, dtype=torch.int64, device=device) for _ in range(2))
    done = torch.zeros(requests, dtype=torch.bool, device=device)
    block = canvas if per_pass == ALL_AT_ONCE else BLOCK
    rows = torch.arange(requests, device=device)[:, None]
    stops = torch.tensor(ends, device=device)
    for start in range(0, canvas, block):
        stop = min(start + block, canvas)
        count = stop - start if per_pass == ALL_AT_ONCE else per_pass
        places = torch.arange(length + start, length + stop, device=device)
        flat = (rows * tokens.shape[1] + places).flatten()
        for _ in range(-(-(stop - start) // count)):
            logits = model(tokens, flat).float().view(requests, stop - start, -1)
            logits[..., mask] = -math.inf
            best = logits.max(dim=-1)
            confidence = (best.values - logits.logsumexp(dim=-1)).exp()
            undecided = answer[:, start:stop] == mask
            confidence = torch.where(undecided, confidence, -1.0)
            chosen = confidence.topk(min(count, stop - start), dim=1).indices
            chosen_mask = torch.zeros_like(undecided).scatter_(1, chosen, True) & undecided
            chosen_mask &= ~done[:, None]
            answer[:, start:stop] = torch.where(chosen_mask, best.indices, answer[:, start:stop])
            passes += ~done
            decided += chosen_mask.sum(dim=1)
            # An end with nothing undecided before it.
            open_before = (answer == mask).cumsum(dim=1)
            done |= (torch.isin(answer, stops) & (open_before == 0)).any(dim=1)
            if bool(done.all()):
                return answer, passes, decided
    return answer, passes, decided


def evaluate(
    model: Model, encoder: Encoder, asked: Sequence[Asked], per_pass: int
) -> dict[str, Score]:
    """Scores by task.

    Args:
        asked: of about one length.
        per_pass: tokens decided in a pass; 0: all in one.
    """
    groups: dict[int, list[Asked]] = defaultdict(list)
    for one in asked:
        groups[one.canvas].append(one)
    scores: dict[str, Score] = defaultdict(Score)
    for canvas, members in groups.items():
        longest = max(len(one.prompt) for one in members)
        size = max(1, MOST_TOKENS // (longest + canvas))
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            prompts = torch.tensor(
                [_filled(encoder, one.prompt, longest) for one in batch], device=model.wte.device
            )
            ends = (encoder.end, encoder.turn_end)
            answers, passes, decided = fill_in(model, prompts, canvas, per_pass, encoder.mask, ends)
            for one, tokens, taken, number in zip(
                batch, answers.tolist(), passes.tolist(), decided.tolist(), strict=True
            ):
                text = answer_text(encoder, tokens)
                score = scores[one.task]
                score.asked += 1
                right = is_correct(text, one.answer)
                score.right += right
                if not right:
                    score.wrong = text, one.answer
                score.lines += right_lines(text, one.answer)
                score.passes += taken
                score.tokens += number
    return scores


def _filled(encoder: Encoder, prompt: Sequence[int], length: int) -> list[int]:
    begin = 1 + len(encoder.user)
    missing = length - len(prompt)
    filling = encoder.encode(_FILLING)
    filling = filling * (missing // len(filling) + 1)
    return [*prompt[:begin], *filling[len(filling) - missing :], *prompt[begin:]]


def answer_text(encoder: Encoder, tokens: Sequence[int]) -> str:
    """Up to the first end of turn or text."""
    kept = []
    for token in tokens:
        if token in (encoder.end, encoder.turn_end):
            break
        kept.append(token)
    return encoder.decode(kept)


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Model:
    """The model that a training saved for the server."""
    config = json.loads((folder / "config.json").read_text())
    names = Shape.__dataclass_fields__
    model = Model(Shape(**{name: config[name] for name in names}))
    tensors = load_file(folder / "model.safetensors")
    state = {}
    for name, parameter in model.named_parameters():
        plain = name.removesuffix(".weight")
        state[name] = tensors[f"model.transformer.{plain}.weight"].reshape(parameter.shape)
    model.load_state_dict(state, strict=False)
    return model.to(device, dtype)


def show(name: str, scores: dict[str, Score]) -> str:
    """One line: exact match of every task, right lines where an answer has several."""
    parts = []
    for task in TASKS:
        if task in scores:
            row = scores[task].row()
            lines = f"/{row['right_lines']:.2f}" if task in LINE_TASKS else ""
            parts.append(f"{task} {row['exact_match']:.2f}{lines}")
    return f"{name}: " + ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path)
    add("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    add("--lengths", nargs="+", type=int, default=[1024, 4096, 8192])
    add("--per-pass", nargs="+", type=int, default=[1, 2, 4, 8, ALL_AT_ONCE])
    add("--documents", type=int, default=100, help="per task and length")
    add("--split", default="test")
    add("--seconds", type=float, default=math.inf, help="begin nothing new after them")
    add("--output", type=Path, help="a line of JSON for each task, length and pace")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(options.model, device, dtype)
    encoder = Encoder(options.model)
    began = time.monotonic()
    for length in options.lengths:
        asked = ask_documents(
            encoder, options.tasks, length, range(options.documents), options.split
        )
        for per_pass in options.per_pass:
            if time.monotonic() - began > options.seconds:
                return 0
            start = time.monotonic()
            scores = evaluate(model, encoder, asked, per_pass)
            seconds = time.monotonic() - start
            print(show(f"{length} tokens, {per_pass or 'all'} a pass", scores), flush=True)
            if options.output:
                _write(options.output, scores, length=length, per_pass=per_pass, batch=seconds)
    return 0


def _write(path: Path, scores: dict[str, Score], **common: Any) -> None:
    with path.open("a") as file:
        for task, score in scores.items():
            file.write(json.dumps({"task": task, **common, **score.row()}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
