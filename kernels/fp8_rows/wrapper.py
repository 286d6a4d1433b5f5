"""Checks and launch of norm and gate with rows in fp8."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FLOATS_16_BIT, FP8, has_kernel
from vllm_sparsed.kernels.fp8_rows.configs import GATE_WARPS, MAX_WIDTH, NORM_WARPS
from vllm_sparsed.kernels.fp8_rows.torch_path import rms_norm_fp8_torch, silu_and_mul_fp8_torch


def silu_and_mul_fp8(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, the gate of SwiGLU (Shazeer, arXiv 2002.05202), with rows in fp8.

    The result of `silu_and_mul`, quantized as vLLM's `dynamic_per_token_scaled_fp8_quant` does: the
    largest value of a row becomes 448. CUDA tensors (and any tensor under Triton's interpreter) go
    to a Triton kernel, CPU tensors to PyTorch.

    Args:
        gate_up: [tokens, 2 * width], bfloat16 or float16, gate and up side by side; width at most
            MAX_WIDTH. Rows may be strided.

    Returns:
        float8_e4m3fn [tokens, width] and float32 scales [tokens, 1]; their product is the result.

    Raises:
        ValueError: gate_up has a wrong shape, dtype or stride.
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up must be [tokens, 2 * width], got {tuple(gate_up.shape)}")
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    _check_rows("gate_up", gate_up, width)
    if not has_kernel(gate_up):
        return silu_and_mul_fp8_torch(gate_up)

    from vllm_sparsed.kernels.fp8_rows.kernel import silu_and_mul_fp8_kernel

    out, scales = _results(num_tokens, width, gate_up.device)
    if num_tokens:
        first, rest = tiles(width)
        silu_and_mul_fp8_kernel[(num_tokens,)](
            gate_up,
            out,
            scales,
            gate_up.stride(0),
            WIDTH=width,
            FIRST=first,
            REST=rest,
            num_warps=GATE_WARPS,
        )
    return out, scales


def rms_norm_fp8(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """RMS norm (Zhang and Sennrich, arXiv 1910.07467, eq. 4) of x + residual, with rows in fp8.

    The sum is rounded to its dtype and replaces residual. The norm is computed from it in float32
    and rounded to fp8 alone, with a scale that makes the largest value of a row 448.

    Args:
        x: [tokens, width], bfloat16 or float16; width at most MAX_WIDTH. Rows may be strided.
        residual: like x, overwritten; None where nothing is to be added.
        weight: [width], of the dtype of x.
        epsilon: added to the mean square.

    Returns:
        float8_e4m3fn [tokens, width] and float32 scales [tokens, 1]; their product is the norm.

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride.
    """
    if x.dim() != 2:
        raise ValueError(f"x must be [tokens, width], got {tuple(x.shape)}")
    num_tokens, width = x.shape
    _check_rows("x", x, width)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(
                f"residual must be {x.dtype} {tuple(x.shape)} like x, "
                f"got {residual.dtype} {tuple(residual.shape)}"
            )
        _check_rows("residual", residual, width)
    if weight.shape != (width,) or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous {x.dtype} ({width},), "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if not has_kernel(x):
        return rms_norm_fp8_torch(x, residual, weight, epsilon)

    import triton

    from vllm_sparsed.kernels.fp8_rows.kernel import rms_norm_fp8_kernel

    out, scales = _results(num_tokens, width, x.device)
    if num_tokens:
        added = x if residual is None else residual
        rms_norm_fp8_kernel[(num_tokens,)](
            x,
            added,
            weight,
            out,
            scales,
            x.stride(0),
            added.stride(0),
            epsilon,
            ADDED=residual is not None,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            num_warps=NORM_WARPS,
        )
    return out, scales


def tiles(width: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0) that cover `width` columns with few to spare."""
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return first, 1 << (rest - 1).bit_length() if rest else 0


def _results(num_tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty((num_tokens, width), dtype=FP8, device=device),
        torch.empty((num_tokens, 1), dtype=torch.float32, device=device),
    )


def _check_rows(name: str, x: Tensor, width: int) -> None:
    if not 0 < width <= MAX_WIDTH:
        raise ValueError(f"{name} must have a width of 1 to {MAX_WIDTH}, got {width}")
    if x.dtype not in FLOATS_16_BIT:
        raise ValueError(f"{name} must be bfloat16 or float16, got {x.dtype}")
    if x.stride(1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
