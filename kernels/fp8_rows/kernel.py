"""Triton kernels of norm and gate that quantize their row: one row per program, read once."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from vllm_sparsed.kernels.fp8_rows import configs

LARGEST = tl.constexpr(configs.LARGEST)
LEAST_SCALE = tl.constexpr(configs.LEAST_SCALE)


@triton.jit
def _scale_of(largest):
    return tl.maximum(tl.div_rn(largest, LARGEST), LEAST_SCALE)


@triton.jit
def _store_scaled(ptrs, values, scale, mask):
    scaled = tl.clamp(tl.div_rn(values, scale), -LARGEST, LARGEST)
    tl.store(ptrs, scaled.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def _gated(ptrs, mask, WIDTH: tl.constexpr):
    gate = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(ptrs + WIDTH, mask=mask, other=0.0).to(tl.float32)
    # Rounded as the gate alone is, so that both ways give the same bits.
    return (gate / (1.0 + tl.exp(-gate)) * up).to(ptrs.dtype.element_ty).to(tl.float32)


@triton.jit
def silu_and_mul_fp8_kernel(
    gate_up_ptr,  # [tokens, 2 * WIDTH]
    out_ptr,  # fp8 [tokens, WIDTH], contiguous
    scales_ptr,  # float32 [tokens]
    gate_up_stride,
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
):
    """Program (token): columns [0, FIRST), and REST more where that is not 0."""
    token = tl.program_id(0).to(tl.int64)
    gate_up_ptr += token * gate_up_stride
    out_ptr += token * WIDTH
    first = tl.arange(0, FIRST)
    first_inside = first < WIDTH
    first_values = _gated(gate_up_ptr + first, first_inside, WIDTH)
    largest = tl.max(tl.abs(first_values), axis=0)
    if REST > 0:
        rest = FIRST + tl.arange(0, REST)
        rest_inside = rest < WIDTH
        rest_values = _gated(gate_up_ptr + rest, rest_inside, WIDTH)
        scale = _scale_of(tl.maximum(largest, tl.max(tl.abs(rest_values), axis=0)))
        _store_scaled(out_ptr + rest, rest_values, scale, rest_inside)
    else:
        scale = _scale_of(largest)
    _store_scaled(out_ptr + first, first_values, scale, first_inside)
    tl.store(scales_ptr + token, scale)


@triton.jit
def rms_norm_fp8_kernel(
    x_ptr,  # [tokens, WIDTH]
    residual_ptr,  # [tokens, WIDTH], or x_ptr again where nothing is added
    weight_ptr,  # [WIDTH]
    out_ptr,  # fp8 [tokens, WIDTH], contiguous
    scales_ptr,  # float32 [tokens]
    x_stride,
    residual_stride,
    epsilon,
    ADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
    if ADDED:
        residual_ptrs = residual_ptr + token * residual_stride + columns
        x = x.to(tl.float32) + tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptrs, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon) * weight
    scale = _scale_of(tl.max(tl.abs(normed), axis=0))
    _store_scaled(out_ptr + token * WIDTH + columns, normed, scale, inside)
    tl.store(scales_ptr + token, scale)
