"""The optimizers of a training: Muon for the layers' matrices, AdamW for everything else."""

from typing import Any

import torch
from torch import Tensor

from small_model.training.model import Model


def make_optimizers(
    model: Model, learning_rate: float, weight_decay: float, *, fused: bool
) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters; vectors do not decay.

    Args:
        model: whose parameters they change.
        learning_rate: of both; Muon's updates are scaled to the size of AdamW's.
        weight_decay: of both.
        fused: whether AdamW runs as one kernel (on CUDA).
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1]
    taken = set(matrices)
    rest = [p for p in model.parameters() if p not in taken]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0},
    ]
    return [
        torch.optim.AdamW(
            groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused
        ),
        StackedMuon(
            matrices,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]


class StackedMuon(torch.optim.Muon):
    """PyTorch's Muon with matrices of one shape orthogonalised together.

    One by one, the forty small matrices of a model cost more time than its forward and backward
    pass. Only Nesterov momentum and the learning rate that matches AdamW's updates are supported.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
                for parameter in parameters:
                    if "momentum_buffer" not in self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, list(gradients), 1 - group["momentum"])
                updates = gradients.lerp(torch.stack(buffers), group["momentum"])
                updates = orthogonalized(
                    updates, group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(updates.float()), alpha=-rate)


def orthogonalized(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices [n, rows, columns] with their singular values near 1, in bfloat16.

    The Newton-Schulz iteration of Muon (K. Jordan, 2024).
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
