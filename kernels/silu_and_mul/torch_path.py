"""CPU serving path of silu(gate) * up."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul_torch(gate_up: Tensor) -> Tensor:
    """[tokens, width] of [tokens, 2 * width], rounded after each of the two operations."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
