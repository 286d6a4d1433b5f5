"""Norm and gate with rows in fp8, in plain PyTorch."""

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.silu_and_mul.reference import silu_and_mul_reference

FP8: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(FP8).max
LEAST_SCALE: Final = 1 / (LARGEST * 512)
"""As in vLLM's quantization of rows, so that rows of zeros have a scale too."""


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [tokens, width] as float8_e4m3fn [tokens, width] times float32 scales [tokens, 1].

    The largest value of each row becomes 448, the largest of the format, as in vLLM's dynamic
    quantization per token.
    """
    x = x.float()
    # Divided by a tensor: PyTorch multiplies by the reciprocal of a Python number.
    largest = torch.full((), LARGEST, dtype=torch.float32, device=x.device)
    scales = (x.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
    return (x / scales).clamp(-LARGEST, LARGEST).to(FP8), scales


def silu_and_mul_fp8_reference(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of [tokens, gate and up side by side], rounded to its dtype, then to fp8."""
    return quantize_rows_reference(silu_and_mul_reference(gate_up))


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467, eq. 4), at least in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight


def rms_norm_fp8_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The norm of x, or of x + residual, which then replaces residual, rounded to fp8 alone."""
    if residual is not None:
        residual.add_(x)
        x = residual
    return quantize_rows_reference(rms_norm_reference(x, weight, epsilon))
