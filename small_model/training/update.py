"""One training step: forward pass, loss, backward pass, optimizers, and what was answered right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from small_model.training.data import TASK_NAMES, Batch
from small_model.training.model import Model


class Update:
    """Changes a model's weights, batch by batch; nothing here waits for the device.

    Attributes:
        loss: float32 scalar on the device: sum over the steps since the last `take_results`.
        counts: int64 [2, tasks]: fully masked answers that were right, and all of them.
    """

    def __init__(
        self, model: Model, optimizers: Sequence[torch.optim.Optimizer], clip: float
    ) -> None:
        """Take over a model and its optimizers.

        Args:
            model: on the device to train on.
            optimizers: of all its parameters.
            clip: largest norm of the gradient.
        """
        self.model, self.optimizers, self.clip = model, optimizers, clip
        self.device = model.wte.device
        self.loss = torch.zeros((), device=self.device)
        self.counts = torch.zeros(2, len(TASK_NAMES), dtype=torch.int64, device=self.device)

    def __call__(self, batch: Batch, rate: float, counted: bool) -> None:
        """One step.

        Args:
            batch: to learn from.
            rate: learning rate.
            counted: whether its answers count.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
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
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.loss += loss.detach()
        if counted and len(batch.question_tasks):
            self._count(batch, logits.detach().argmax(dim=-1) != targets)

    def take_results(self) -> tuple[float, list[int], list[int]]:
        """Summed loss, right answers and all answers per task since the last call; waits."""
        loss = float(self.loss)
        right, asked = self.counts.tolist()
        self.loss.zero_()
        self.counts.zero_()
        return loss, right, asked

    def _count(self, batch: Batch, wrong: Tensor) -> None:
        """A fully masked answer is right when all of its tokens are."""
        questions, tasks = self._moved(batch.questions), self._moved(batch.question_tasks)
        # Positions of no such question go to a place of their own, at the end.
        mistakes = torch.zeros(len(tasks) + 1, dtype=torch.int64, device=self.device)
        mistakes.index_add_(0, questions % len(mistakes), wrong.long())
        self.counts[0].index_add_(0, tasks, (mistakes[:-1] == 0).long())
        self.counts[1].index_add_(0, tasks, torch.ones_like(tasks))

    def _moved(self, array: Any) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """On CUDA products in bfloat16 and FlashAttention."""
        if self.device.type != "cuda":
            yield
            return
        with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
