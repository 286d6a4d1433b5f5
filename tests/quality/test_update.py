"""A training step against the same written out plainly."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from small_model.training.data import TASK_NAMES, Encoder, Stage, make_batch
from small_model.training.model import Model, Shape
from small_model.training.optimizers import make_optimizers
from small_model.training.update import Update

STAGE = Stage(3, 320, False, 0.5, (("multi_key", 0.5), ("report", 0.5)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_steps_are_those_of_a_plain_loop(device: str, encoder: Encoder) -> None:
    torch.manual_seed(0)
    rows = -(-encoder.vocab_size // 64) * 64
    ours = Model(Shape(rows, d_model=128, n_heads=2, n_layers=2, mlp_hidden_size=192)).to(device)
    plain = copy.deepcopy(ours)
    cuda = device == "cuda"
    update = Update(ours, make_optimizers(ours, 0.0, 0.1, fused=cuda), clip=1.0)
    optimizers = make_optimizers(plain, 0.0, 0.1, fused=cuda)
    losses, right, asked = [], 0, 0
    for step in range(4):
        batch = make_batch(encoder, 0, step, STAGE, 6 + 2 * (step % 2))
        rate = 1e-3 * (step + 1)
        update(batch, rate, counted=step != 1)

        tokens, positions, targets, weights = (
            torch.from_numpy(array).to(device)
            for array in (batch.tokens, batch.positions, batch.targets, batch.weights)
        )
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            logits = plain(tokens, positions)
        loss = (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss))
        if step != 1:
            wrong = (logits.argmax(-1) != targets).cpu().numpy()
            for question in range(len(batch.question_tasks)):
                asked += 1
                right += not wrong[batch.questions == question].any()
    total, per_task_right, per_task_asked = update.take_results()
    assert total == pytest.approx(sum(losses), rel=2e-2 if cuda else 1e-6)
    assert (sum(per_task_right), sum(per_task_asked)) == (right, asked)
    assert asked > 0
    assert update.take_results() == (0.0, [0] * len(TASK_NAMES), [0] * len(TASK_NAMES))
    for (name, mine), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        apart = (mine - other).abs()
        # Where a gradient is only rounding, its sign decides the whole of an update.
        assert float(apart.max()) <= (2e-2 if cuda else 1e-3), name
        assert float(apart.mean()) <= (1e-3 if cuda else 1e-6), name
