"""CPU serving path of norm and gate with rows in fp8."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FP8
from vllm_sparsed.kernels.fp8_rows.configs import LARGEST, LEAST_SCALE
from vllm_sparsed.kernels.silu_and_mul.torch_path import silu_and_mul_torch


def silu_and_mul_fp8_torch(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Arguments and results of `silu_and_mul_fp8`."""
    return _quantize(silu_and_mul_torch(gate_up))


def rms_norm_fp8_torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `rms_norm_fp8`."""
    if residual is not None:
        residual.add_(x)
        x = residual
    x = x.float()
    return _quantize(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight)


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """[tokens, width] as float8_e4m3fn times float32 scales [tokens, 1]."""
    x = x.float()
    # Divided by a tensor: PyTorch multiplies by the reciprocal of a Python number.
    largest = torch.full((), LARGEST, dtype=torch.float32, device=x.device)
    scales = (x.abs().amax(dim=-1, keepdim=True) / largest).clamp_min(LEAST_SCALE)
    return (x / scales).clamp(-LARGEST, LARGEST).to(FP8), scales
