"""silu(gate) * up in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202, SwiGLU) of [..., gate and up side by side]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
