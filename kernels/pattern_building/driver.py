"""Builds the pattern of one request and layer, some heads at a time."""

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels import block_importance as importance_operation
from vllm_sparsed.kernels import block_selection as selection_operation
from vllm_sparsed.kernels.block_importance import block_importance
from vllm_sparsed.kernels.block_selection import select_blocks
from vllm_sparsed.kernels.pattern_building.bounds import generation_start_block

# Bytes of both maps and the softmax statistics of the heads that are worked on together. One head
# of 8192 blocks alone may take a little more.
MAP_BYTES: Final = 512 * 2**20


def build_pattern(
    q: Tensor,
    k: Tensor,
    *,
    canvas_len: int,
    block_size: int,
    select: float,
    scale: float,
    lse: Tensor | None,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> None:
    """Build and store the pattern of ONE request and layer (SparseD, arXiv 2509.24014, section 4).

    Nothing waits for the device; temporaries stay under 1 GiB up to 8192 blocks.

    Args:
        q: [L, num_heads, D] after rotary embedding; strided views allowed, last dim contiguous.
        k: [L, num_kv_heads, D], likewise.
        canvas_len: tokens of the canvas, the last ones of the L, in [1, L].
        block_size: 16, 32, 64 or 128 tokens.
        select: share of key blocks to keep in each part, in (0, 1].
        scale: factor of the scores.
        lse: float32 [num_heads, L], natural log of the sum of exp(scaled scores) over all keys, as
            FlashAttention returns it. None: computed here, at the cost of another pass.
        pattern_rows: int32 or int64 [n], n = ceil(L / block_size): distinct rows of the store.
        indices: int16 or int32 [pattern rows, num_heads, width]: [pattern_rows[i], h, :count]
            becomes the ascending key blocks that query block i of head h keeps.
        counts: int32 [pattern rows, num_heads]: [pattern_rows[i], h] becomes that count.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    seq_len, num_heads, _ = q.shape
    if not 1 <= canvas_len <= seq_len:
        raise ValueError(f"canvas_len must be in [1, {seq_len}], got {canvas_len}")
    if indices.dim() != 3 or indices.shape[1] != num_heads:
        raise ValueError(
            f"indices must be [pattern rows, {num_heads}, width], got {list(indices.shape)}"
        )
    if lse is not None and lse.shape != (num_heads, seq_len):
        raise ValueError(f"lse must be {(num_heads, seq_len)}, got {tuple(lse.shape)}")
    first_generation_block = generation_start_block(seq_len, canvas_len, block_size)
    num_blocks = -(-seq_len // block_size)
    head_bytes = 4 * num_blocks * (2 * num_blocks - first_generation_block) + 16 * seq_len
    group = num_heads // k.shape[1]
    for heads in head_chunks(num_heads, group, max(1, MAP_BYTES // head_bytes)):
        importance, generation_importance = block_importance(
            q[:, heads],
            k[:, heads.start // group : -(-heads.stop // group)],
            first_generation_block=first_generation_block,
            block_size=block_size,
            scale=scale,
            lse=None if lse is None else lse[heads],
        )
        select_blocks(
            importance,
            generation_importance,
            first_generation_block=first_generation_block,
            select=select,
            pattern_rows=pattern_rows,
            indices=indices[:, heads],
            counts=counts[:, heads],
        )


def head_chunks(num_heads: int, group: int, largest: int) -> Iterator[slice]:
    """Slices of at most `largest` heads that hold whole key-value groups or lie within one."""
    if largest >= group:
        size = largest // group * group
    else:
        size = max(divisor for divisor in range(1, largest + 1) if group % divisor == 0)
    for first in range(0, num_heads, size):
        yield slice(first, min(first + size, num_heads))


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_sizes: Sequence[int],
    *,
    device: torch.device | str,
    index_dtype: torch.dtype = torch.int16,
    slot_dtype: torch.dtype = torch.int32,
    max_num_blocks: int = selection_operation.MAX_BLOCKS,
) -> None:
    """Compile every kernel variant that build_pattern can need for one model. On a CPU: nothing.

    max_num_blocks: blocks of the longest sequence at the smallest block size.
    """
    if torch.device(device).type != "cuda":
        return
    importance_operation.warm_up(num_heads, num_kv_heads, head_dim, dtype, block_sizes, device)
    selection_operation.warm_up(
        device, index_dtype=index_dtype, slot_dtype=slot_dtype, max_num_blocks=max_num_blocks
    )
