"""Norm and gate with rows in fp8, in plain PyTorch."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FP8
from vllm_sparsed.kernels.fp8_rows.configs import LARGEST, LEAST_SCALE


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


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight (Zhang and Sennrich, arXiv 1910.07467, eq. 4), at least in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * weight
