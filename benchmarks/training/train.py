"""Train the small diffusion language model from nothing, in one command.

    python -m benchmarks.training.train --output small-model --minutes 20

The folder gets `model/` (what vLLM serves), `checkpoint/` (to go on from) and `log.jsonl`. The same
command goes on where a checkpoint lies; Ctrl-C or --stop-after ends a run at any moment. The
objective is that of LLaDA's supervised fine-tuning (arXiv 2502.09992): answer tokens are masked at
a random ratio t and predicted with weight 1/t. On a CPU an interrupted training ends bit for bit as
an uninterrupted one; on CUDA the gradients of attention are summed in varying order.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from benchmarks.training.batches import BatchSource, batch_source
from benchmarks.training.checkpoint import (
    load_checkpoint,
    restore,
    save_checkpoint,
    training_tensors,
)
from benchmarks.training.curriculum import STAGES, Curriculum
from benchmarks.training.data import TASK_NAMES, Batch, Encoder, Stage
from benchmarks.training.model import Model, Shape, save_served_model
from benchmarks.training.optimizers import make_optimizers
from benchmarks.training.tokenizer import train_tokenizer

CHECK_EVERY: Final = 20  # steps between looks at the loss and the exact match
SAVE_EVERY: Final = 120.0  # seconds
COOLDOWN: Final = 0.15  # last share of the time, in which the learning rate falls
LAST_RATE: Final = 0.05  # of the learning rate, at the end of it


# The tokenizer says how many rows the embedding has.
SMALL: Final = Shape(vocab_size=0)


@dataclass(frozen=True, slots=True)
class Settings:
    """What defines a training; one that goes on must have the same.

    Attributes:
        warm_up: steps in which the learning rate rises.
        clip: largest norm of the gradient.
    """

    seed: int = 0
    batch_tokens: int = 65_536
    learning_rate: float = 1e-3
    warm_up: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    shape: Shape = SMALL
    stages: tuple[Stage, ...] = STAGES


# For a look at the machinery on a CPU: it learns the form of an answer and little more.
SMOKE: Final = Settings(
    batch_tokens=2048,
    warm_up=10,
    shape=Shape(0, d_model=64, n_heads=1, n_layers=2, mlp_hidden_size=128),
    stages=(
        Stage(1, 128, False, (("multi_key", 1.0),)),
        replace(STAGES[2], facts=4, length=512),
        replace(STAGES[5], facts=4, length=1024),
    ),
)


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop.

    Attributes:
        minutes: of the whole training, all runs together.
        stop_after: minutes of this run.
        max_steps: of the whole training.
    """

    minutes: float
    stop_after: float = float("inf")
    max_steps: float = float("inf")


class Training:
    """Model, optimizers, curriculum and progress; goes on from a checkpoint if there is one."""

    def __init__(
        self, settings: Settings, folder: Path, device: torch.device, compiled: bool = False
    ) -> None:
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
        self.model = Model(self.settings.shape).to(device)
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizers = make_optimizers(self.model, rate, decay, fused=device.type == "cuda")
        self.curriculum = Curriculum(settings.stages)
        self.step, self.seconds = 0, 0.0
        self.cooldown: tuple[int, int] | None = None  # first step, steps
        self._counts = torch.zeros(2, len(TASK_NAMES), dtype=torch.int64, device=device)
        self._resume()
        if compiled:
            for block in self.model.blocks:
                block.compile(dynamic=True)

    @property
    def finished(self) -> bool:
        return self.cooldown is not None and self.step >= sum(self.cooldown)

    def rate(self) -> float:
        """Learning rate of the next step."""
        rate = self.settings.learning_rate * min(1.0, (self.step + 1) / self.settings.warm_up)
        if self.cooldown is not None:
            first, steps = self.cooldown
            rate *= 1 - (1 - LAST_RATE) * (self.step - first) / steps
        return rate

    def train_step(self, batch: Batch, current: bool) -> Tensor:
        """One step; returns the loss.

        Args:
            batch: of this step.
            current: whether it is of the current stage, so that its answers count.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate()
        tokens, positions, targets, weights = (
            self._moved(array)
            for array in (batch.tokens, batch.positions, batch.targets, batch.weights)
        )
        with self._precision():
            logits = self.model(tokens, positions)
        logits = logits.float()
        loss = (cross_entropy(logits, targets, reduction="none") * weights).sum()
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        if current and len(batch.question_tasks):
            self._count(batch, logits.detach().argmax(dim=-1) != targets)
        return loss.detach()

    def flush_counts(self) -> None:
        """Hand the answers counted on the device to the curriculum."""
        correct, asked = self._counts.tolist()
        self.curriculum.add(correct, asked)
        self._counts.zero_()

    def save(self) -> None:
        """Write the checkpoint and the model that vLLM serves."""
        self.flush_counts()
        state = {
            "settings": _plain(self.settings),
            "step": self.step,
            "seconds": self.seconds,
            "cooldown": self.cooldown,
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
        self.cooldown = tuple(state["cooldown"]) if state["cooldown"] else None
        self.curriculum = Curriculum(self.settings.stages, **state["curriculum"])

    def _moved(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """bfloat16 products on CUDA, and there the attention that is fastest on Hopper chips."""
        if self.device.type != "cuda":
            yield
            return
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(order, set_priority=True):
            yield

    def _count(self, batch: Batch, wrong: Tensor) -> None:
        """A fully masked answer is right when all of its tokens are."""
        questions, tasks = self._moved(batch.questions), self._moved(batch.question_tasks)
        # Positions of no such question go to a place of their own, at the end.
        mistakes = torch.zeros(len(tasks) + 1, dtype=torch.int64, device=self.device)
        mistakes.index_add_(0, questions % len(mistakes), wrong.long())
        self._counts[0].index_add_(0, tasks, (mistakes[:-1] == 0).long())
        self._counts[1].index_add_(0, tasks, torch.ones_like(tasks))


def run(training: Training, budget: Budget, workers: int, quiet: bool = False) -> None:
    """Train until the budget, this run's share of it, or a signal says stop; then save."""
    settings = training.settings
    log = _Log(training, budget, quiet)
    with (
        _StopSignal() as stop,
        batch_source(settings.seed, settings.batch_tokens, training.tokenizer, workers) as source,
    ):
        _steps(training, budget, source, log, stop)
        training.save()
        log.event(f"saved at step {training.step}" + (", finished" if training.finished else ""))


def _steps(
    training: Training, budget: Budget, source: BatchSource, log: "_Log", stop: "_StopSignal"
) -> None:
    settings, curriculum = training.settings, training.curriculum
    began = saved = last = time.monotonic()
    pace: float | None = None  # seconds of a step, of late
    losses: list[Tensor] = []
    while not training.finished and training.step < budget.max_steps:
        index = curriculum.stage_of(settings.seed, training.step)
        try:
            batch = source.batch(curriculum, training.step)
        except BrokenProcessPool:
            # A signal to the whole group reached workers that were only starting.
            if stop.asked:
                return
            raise
        losses.append(training.train_step(batch, index == curriculum.stage))
        if training.step % CHECK_EVERY == 0:
            loss = float(torch.stack(losses).mean())
            losses.clear()
            if math.isnan(loss):
                raise SystemExit(
                    f"the loss is not a number at step {training.step}; the checkpoint in "
                    f"{training.folder} is from before"
                )
            training.flush_counts()
            log.write(loss, curriculum.exact_match())
            passed = curriculum.verdict(training.step)
            if passed is not None:
                log.event(f"stage {curriculum.stage} from here on: {passed}")
        now = time.monotonic()
        spent, last = now - last, now
        training.seconds += spent
        pace = spent if pace is None else 0.98 * pace + 0.02 * spent
        _begin_cooldown(training, budget, pace)
        if stop.asked or now - began > 60 * budget.stop_after:
            return
        if now - saved > SAVE_EVERY:
            training.save()
            saved = now


def _begin_cooldown(training: Training, budget: Budget, pace: float) -> None:
    """Let the learning rate fall over as many steps as the rest of the time will hold."""
    left = 60 * budget.minutes - training.seconds
    if training.cooldown is None and left <= 60 * budget.minutes * COOLDOWN:
        training.cooldown = (training.step, max(1, int(left / pace)))


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

    def __init__(self, training: Training, budget: Budget, quiet: bool) -> None:
        self.training, self.minutes, self.quiet = training, budget.minutes, quiet
        self.path = training.folder / "log.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        # What a run wrote after the checkpoint that this one goes on from.
        kept = [line for line in lines if json.loads(line)["step"] <= training.step]
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
            share = min(1.0, training.seconds / 60 / self.minutes)
            shown = " ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
            print(
                f"\r[{'#' * int(20 * share):20}] {training.seconds / 60:5.1f}/{self.minutes:g} min "
                f"step {training.step} stage {stage} loss {loss:.4f} {shown}",
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
    add("--minutes", type=float, default=20.0, help="of the whole training, all runs together")
    add("--stop-after", type=float, default=float("inf"), help="minutes of this run")
    add("--max-steps", type=float, default=float("inf"), help="of the whole training; 0: save only")
    add("--seed", type=int, default=0)
    add("--learning-rate", type=float, help="default: 0.001")
    add("--batch-tokens", type=int, help="default: 65536")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 1) - 2)))
    add("--compile", action="store_true", help="torch.compile the layers")
    add("--smoke", action="store_true", help="a tiny model and tiny documents")
    options = parser.parse_args()
    given = {
        name: getattr(options, name)
        for name in ("seed", "learning_rate", "batch_tokens")
        if getattr(options, name) is not None
    }
    settings = replace(SMOKE if options.smoke else Settings(), **given)
    training = Training(settings, options.output, torch.device(options.device), options.compile)
    parameters = sum(p.numel() for p in training.model.parameters())
    print(f"{parameters:,} parameters on {options.device}, from step {training.step}")
    run(training, Budget(options.minutes, options.stop_after, options.max_steps), options.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
