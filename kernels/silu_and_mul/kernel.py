"""Triton kernel of silu(gate) * up: part of one row per program."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def silu_and_mul_kernel(
    gate_up_ptr,  # [tokens, 2 * WIDTH]
    out_ptr,  # [tokens, WIDTH], contiguous
    gate_up_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, part)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    gate_ptrs = gate_up_ptr + token * gate_up_stride + columns
    gate = tl.load(gate_ptrs, mask=mask).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=mask).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + token * WIDTH + columns, result.to(out_ptr.dtype.element_ty), mask=mask)
