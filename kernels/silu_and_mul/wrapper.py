"""Checks and launch of silu(gate) * up."""

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FLOATS_16_BIT, has_kernel
from vllm_sparsed.kernels.silu_and_mul.torch_path import silu_and_mul_torch

BLOCK: Final = 2048
"""Most columns of one program."""
NUM_WARPS: Final = 4


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, the gate of SwiGLU (Shazeer, arXiv 2002.05202).

    CUDA tensors (and any tensor under Triton's interpreter) go to the Triton kernel, which computes
    in float32 and rounds once; CPU tensors to PyTorch.

    Args:
        gate_up: [tokens, 2 * width], bfloat16 or float16 (the kernel's exponential is too coarse
            for float32): gate and up side by side. Rows may be strided.

    Returns:
        [tokens, width].

    Raises:
        ValueError: gate_up has a wrong shape, dtype or stride.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not gate_up.shape[1]:
        raise ValueError(f"gate_up must be [tokens, 2 * width], got {tuple(gate_up.shape)}")
    if gate_up.dtype not in FLOATS_16_BIT:
        raise ValueError(f"gate_up must be bfloat16 or float16, got {gate_up.dtype}")
    if gate_up.stride(1) != 1:
        raise ValueError("gate_up must be contiguous in its last dimension")
    if not has_kernel(gate_up):
        return silu_and_mul_torch(gate_up)

    import triton

    from vllm_sparsed.kernels.silu_and_mul.kernel import silu_and_mul_kernel

    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(width))
    silu_and_mul_kernel[(num_tokens, -(-width // block))](
        gate_up,
        out,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=NUM_WARPS,
    )
    return out
