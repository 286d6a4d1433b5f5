"""Triton kernel of the rotary embedding: one token and a few heads per program."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def rotary_embedding_kernel(
    positions_ptr,  # int64 [tokens]
    query_ptr,  # [tokens, NUM_HEADS * 2 * HALF]
    key_ptr,  # [tokens, NUM_KV_HEADS * 2 * HALF]
    cos_sin_ptr,  # float32 [positions, 2 * HALF], contiguous
    query_stride,
    key_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Program (token, head block); the blocks of the query heads come first."""
    QUERY_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    elements = tl.arange(0, BLOCK_HALF)
    angles = cos_sin_ptr + tl.load(positions_ptr + token) * (2 * HALF) + elements
    inside = elements < HALF
    cos = tl.load(angles, mask=inside, other=0.0)[None, :]
    sin = tl.load(angles + HALF, mask=inside, other=0.0)[None, :]

    if block < QUERY_BLOCKS:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < NUM_HEADS)[:, None] & inside[None, :]
        pointers = query_ptr + token * query_stride
    else:
        heads = (block - QUERY_BLOCKS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < NUM_KV_HEADS)[:, None] & inside[None, :]
        pointers = key_ptr + token * key_stride
    first_ptrs = pointers + heads[:, None] * (2 * HALF) + elements[None, :]
    first = tl.load(first_ptrs, mask=mask).to(tl.float32)  # [BLOCK_HEADS, BLOCK_HALF]
    second = tl.load(first_ptrs + HALF, mask=mask).to(tl.float32)
    dtype = query_ptr.dtype.element_ty
    tl.store(first_ptrs, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(first_ptrs + HALF, (second * cos + first * sin).to(dtype), mask=mask)
