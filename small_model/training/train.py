"""Train the small diffusion language model from nothing, in one command.

    python -m small_model.training.train --output small-model

The folder gets `model/` (what vLLM serves), `checkpoint/` (to go on from) and `log.jsonl`. The same
command goes on where a checkpoint lies; Ctrl-C or --stop-after ends a run at any moment. The
objective is that of LLaDA's supervised fine-tuning (arXiv 2502.09992): answer tokens are masked at
a random ratio t and predicted with weight 1/t. On a CPU an interrupted training ends bit for bit as
an uninterrupted one; on CUDA the gradients of attention are summed in varying order.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from small_model.training.batches import BatchSource, batch_source
from small_model.training.checkpoint import (
    load_checkpoint,
    restore,
    save_checkpoint,
    training_tensors,
)
from small_model.training.curriculum import STAGES, Curriculum
from small_model.training.data import TASK_NAMES, Batch, Encoder, Stage
from small_model.training.evaluation import ask_documents, evaluate, show
from small_model.training.initialization import align_forms, shape_attention
from small_model.training.model import Model, Shape, save_served_model
from small_model.training.optimizers import make_optimizers
from small_model.training.tokenizer import train_tokenizer
from small_model.training.update import Update

CHECK_EVERY: Final = 20  # steps between looks at the loss and the exact match
SAVE_EVERY: Final = 120.0  # seconds
LOOK_DOCUMENTS: Final = 16  # per task, held out, of an evaluation in between
LOOK_LENGTH: Final = 1024
COOLDOWN: Final = 0.3  # last share of the steps, in which the learning rate falls
LAST_RATE: Final = 0.05  # of the learning rate, at the end of it


# The tokenizer says how many rows the embedding has.
SMALL: Final = Shape(vocab_size=0)


@dataclass(frozen=True, slots=True)
class Settings:
    """What defines a training; one that goes on must have the same.

    Attributes:
        steps: of the whole training.
        warm_up: steps in which the learning rate rises.
        clip: largest norm of the gradient.
    """

    seed: int = 0
    steps: int = 20_000
    batch_tokens: int = 32_768
    learning_rate: float = 1e-3
    warm_up: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    shape: Shape = SMALL
    stages: tuple[Stage, ...] = STAGES


# For a look at the machinery on a CPU: it learns the form of an answer and little more.
SMOKE: Final = Settings(
    steps=300,
    batch_tokens=2048,
    warm_up=10,
    shape=Shape(0, d_model=64, n_heads=1, n_layers=2, mlp_hidden_size=128),
    stages=(
        Stage(1, 128, False, 0.0, (("multi_key", 1.0),)),
        replace(STAGES[2], facts=4, length=512),
        replace(STAGES[4], facts=4, length=1024),
    ),
)


class Training:
    """Model, optimizers, curriculum and progress; goes on from a checkpoint if there is one."""

    def __init__(self, settings: Settings, folder: Path, device: torch.device) -> None:
        """Raises ValueError where the folder holds a training with other settings."""
        self.folder, self.device = folder, device
        self.tokenizer = folder / "model"
        if not (self.tokenizer / "tokenizer_config.json").exists():
            train_tokenizer(self.tokenizer)
        self.encoder = Encoder(self.tokenizer)
        # Rows in whole tiles of the matrix units.
        rows = -(-self.encoder.vocab_size // 64) * 64
        self.settings = replace(settings, shape=replace(settings.shape, vocab_size=rows))
        torch.manual_seed(settings.seed)
        self.model = Model(self.settings.shape)
        align_forms(self.model, self.encoder.forms)
        shape_attention(self.model, self.encoder.start)
        self.model.to(device)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizers = make_optimizers(self.model, rate, decay, fused=device.type == "cuda")
        self.curriculum = Curriculum(settings.stages)
        self.step, self.seconds = 0, 0.0
        # Sum and number of the steps since the loss was last taken.
        self._loss, self._loss_steps = 0.0, 0
        self._resume()
        self.update = Update(self.model, self.optimizers, settings.clip)

    @property
    def finished(self) -> bool:
        return self.step >= self.settings.steps

    def rate(self) -> float:
        """Learning rate of the next step."""
        rise = (self.step + 1) / self.settings.warm_up
        left = (self.settings.steps - self.step) / (COOLDOWN * self.settings.steps)
        fall = 1 - (1 - LAST_RATE) * (1 - left)
        return self.settings.learning_rate * min(1.0, rise, fall)

    def train_step(self, batch: Batch, current: bool) -> None:
        """One step.

        Args:
            batch: of this step.
            current: whether it is of the current stage, so that its answers count.
        """
        self.update(batch, self.rate(), counted=current)
        self.step += 1
        self._loss_steps += 1

    def take_loss(self) -> float:
        """Mean over the steps since the last call; the curriculum gets the answers counted."""
        self._flush_results()
        loss = self._loss / self._loss_steps
        self._loss, self._loss_steps = 0.0, 0
        return loss

    def _flush_results(self) -> None:
        loss, correct, asked = self.update.take_results()
        self.curriculum.add(correct, asked)
        self._loss += loss

    def save(self) -> None:
        """Write the checkpoint and the model that vLLM serves."""
        self._flush_results()
        state = {
            "settings": _plain(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "curriculum": {k: v for k, v in asdict(self.curriculum).items() if k != "stages"},
        }
        save_checkpoint(
            self.folder / "checkpoint", training_tensors(self.model, self.optimizers), state
        )
        encoder = self.encoder
        save_served_model(
            self.model,
            self.tokenizer,
            self.folder / "model",
            mask=encoder.mask,
            end=encoder.end,
            turn_end=encoder.turn_end,
        )

    def _resume(self) -> None:
        found = load_checkpoint(self.folder / "checkpoint")
        if found is None:
            return
        tensors, state = found
        if state["settings"] != _plain(self.settings):
            raise ValueError(f"{self.folder} holds a training with other settings")
        restore(self.model, self.optimizers, tensors)
        self.step, self.seconds = state["step"], state["seconds"]
        self.curriculum = Curriculum(self.settings.stages, **state["curriculum"])


def run(
    training: Training,
    workers: int,
    stop_after: float = float("inf"),
    stop_at: float = float("inf"),
    quiet: bool = False,
    look_every: float = float("inf"),
) -> None:
    """Train and save: to the last step, a signal, `stop_after` minutes or the step `stop_at`.

    Every `look_every` steps some questions are asked.
    """
    settings = training.settings
    log = _Log(training, quiet)
    with (
        _StopSignal() as stop,
        batch_source(settings.seed, settings.batch_tokens, training.tokenizer, workers) as source,
    ):
        _steps(training, source, log, stop, 60 * stop_after, stop_at, look_every)
        training.save()
        log.event(f"saved at step {training.step}" + (", finished" if training.finished else ""))


def _steps(
    training: Training,
    source: BatchSource,
    log: "_Log",
    stop: "_StopSignal",
    seconds: float,
    stop_at: float,
    look_every: float,
) -> None:
    settings, curriculum = training.settings, training.curriculum
    began = saved = last = time.monotonic()
    while not training.finished and training.step < stop_at:
        index = curriculum.stage_of(settings.seed, training.step)
        try:
            batch = source.batch(curriculum, training.step)
        except BrokenProcessPool:
            # A signal to the whole group reached workers that were only starting.
            if stop.asked:
                return
            raise
        training.train_step(batch, index == curriculum.stage)
        now = time.monotonic()
        training.seconds += now - last
        last = now
        if training.step % CHECK_EVERY == 0:
            loss = training.take_loss()
            if math.isnan(loss):
                raise SystemExit(
                    f"the loss is not a number at step {training.step}; the checkpoint in "
                    f"{training.folder} is from before"
                )
            log.write(loss, curriculum.exact_match())
            passed = curriculum.verdict(training.step)
            if passed is not None:
                log.event(f"stage {curriculum.stage} from here on: {passed}")
        if training.step % look_every == 0:
            for line in look(training):
                log.event(line)
        if stop.asked or now - began > seconds:
            return
        if now - saved > SAVE_EVERY:
            training.save()
            saved = now


def look(training: Training) -> list[str]:
    """Answers to some held-out questions: token by token, four in a pass, all in one."""
    asked = ask_documents(
        training.encoder, TASK_NAMES, LOOK_LENGTH, range(LOOK_DOCUMENTS), "validation"
    )
    lines = []
    dtype = torch.bfloat16 if training.device.type == "cuda" else torch.float32
    model = copy.deepcopy(training.model).to(dtype)
    for per_pass in (1, 4, 0):
        scores = evaluate(model, training.encoder, asked, per_pass)
        lines.append(show(f"{per_pass or 'all'} a pass", scores))
        if per_pass == 1:
            lines += [f"{name}: {score.wrong}" for name, score in scores.items() if score.wrong]
    return lines


class _StopSignal:
    """Within it, a request to end the process is remembered instead of carried out."""

    def __enter__(self) -> "_StopSignal":
        self.asked = False
        self._former = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


class _Log:
    """A bar on the terminal and a line of JSON for every look."""

    def __init__(self, training: Training, quiet: bool) -> None:
        self.training, self.quiet = training, quiet
        self.path = training.folder / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # What a run wrote after the checkpoint that this one goes on from.
        kept = [line for line in lines if _step_of(line) <= training.step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def write(self, loss: float, exact_match: dict[str, float]) -> None:
        training = self.training
        stage = training.curriculum.stage
        rates = {name: round(rate, 4) for name, rate in exact_match.items()}
        self._append(
            step=training.step,
            seconds=round(training.seconds, 1),
            stage=stage,
            length=training.settings.stages[stage].length,
            loss=round(loss, 5),
            learning_rate=training.rate(),
            exact_match=rates,
        )
        if not self.quiet:
            steps = training.settings.steps
            shown = " ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
            print(
                f"\r[{'#' * (20 * training.step // steps):20}] step {training.step} of {steps} "
                f"{training.seconds / 60:.1f} min stage {stage} loss {loss:.4f} {shown}",
                end="\x1b[K",
                flush=True,
            )

    def event(self, text: str) -> None:
        self._append(step=self.training.step, event=text)
        if not self.quiet:
            print(f"\rstep {self.training.step}: {text}\x1b[K", flush=True)

    def _append(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _step_of(line: str) -> float:
    """Of a line of the log; beyond all steps where a killed process wrote half of it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


def _plain(settings: Settings) -> dict[str, Any]:
    """As JSON gives it back: lists for tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder; a training in it goes on")
    add("--steps", type=int, help=f"of the whole training; default: {Settings().steps}")
    add("--stop-after", type=float, default=float("inf"), help="minutes of this run")
    add("--stop-at", type=float, default=float("inf"), help="step; 0: save only")
    add("--seed", type=int, default=0)
    add("--learning-rate", type=float, help="default: 0.001")
    add("--batch-tokens", type=int, help=f"default: {Settings().batch_tokens}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 1) - 2)))
    add("--look-every", type=float, default=float("inf"), help="steps between some questions")
    add("--smoke", action="store_true", help="a tiny model and tiny documents")
    options = parser.parse_args()
    given = {
        name: getattr(options, name)
        for name in ("seed", "steps", "learning_rate", "batch_tokens")
        if getattr(options, name) is not None
    }
    settings = replace(SMOKE if options.smoke else Settings(), **given)
    training = Training(settings, options.output, torch.device(options.device))
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters:,} parameters on {options.device}, from step {training.step}")
    run(training, options.workers, options.stop_after, options.stop_at, False, options.look_every)
    return 0


if __name__ == "__main__":
    sys.exit(main())
