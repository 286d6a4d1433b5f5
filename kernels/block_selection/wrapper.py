"""Checks and dispatch of the selection."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.block_selection.bounds import kept_columns
from vllm_sparsed.kernels.block_selection.configs import MAX_BLOCKS, TABLE, padded_width
from vllm_sparsed.kernels.block_selection.torch_path import select_blocks_torch
from vllm_sparsed.kernels.devices import INDEX_DTYPES, has_kernel


def select_blocks(
    importance: Tensor,
    generation_importance: Tensor,
    *,
    first_generation_block: int,
    select: float,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> None:
    """Write the pattern of ONE request's rows: ascending lists of kept key blocks.

    Keeps in every row the top kept_columns(n) of all columns, less those of the generation part,
    and the top kept_columns(ng) of the generation part by its own scores (SparseD, arXiv
    2509.24014). Among equal scores the lowest column is kept first.

    Args:
        importance: float32 [num_heads, n, n], not negative, contiguous.
        generation_importance: float32 [num_heads, n, ng], ng = n - first_generation_block.
        first_generation_block: first column of the generation part, in [0, n).
        select: share of the columns to keep, in (0, 1].
        pattern_rows: int32 or int64 [n], distinct rows of the store for query blocks 0 .. n - 1.
        indices: int16 or int32 [pattern rows, num_heads, width]; [row, head, :count] is written.
            May be a view of some heads of the store; last dimension contiguous.
        counts: int32 [pattern rows, num_heads], likewise.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(
        importance,
        generation_importance,
        first_generation_block,
        select,
        pattern_rows,
        indices,
        counts,
    )
    num_heads, num_blocks, _ = importance.shape
    num_generation = num_blocks - first_generation_block
    num_kept = kept_columns(num_blocks, select)
    num_kept_generation = kept_columns(num_generation, select)
    needed = min(first_generation_block, num_kept) + num_kept_generation
    if needed > indices.shape[2]:
        raise ValueError(f"indices must be at least {needed} wide, got {indices.shape[2]}")
    if not has_kernel(importance):
        select_blocks_torch(
            importance,
            generation_importance,
            first_generation_block=first_generation_block,
            num_kept=num_kept,
            num_kept_generation=num_kept_generation,
            pattern_rows=pattern_rows,
            indices=indices,
            counts=counts,
        )
        return

    from vllm_sparsed.kernels.block_selection.kernel import select_blocks_kernel

    width = padded_width(num_blocks)
    select_blocks_kernel[(num_blocks, num_heads)](
        importance,
        generation_importance,
        pattern_rows,
        indices,
        counts,
        num_blocks,
        first_generation_block,
        num_kept,
        num_kept_generation,
        indices.stride(0),
        indices.stride(1),
        counts.stride(0),
        WIDTH=width,
        num_warps=TABLE[width],
    )


def warm_up(
    device: torch.device | str,
    *,
    index_dtype: torch.dtype,
    slot_dtype: torch.dtype = torch.int32,
    max_num_blocks: int = MAX_BLOCKS,
) -> None:
    """Compile every variant that sequences of up to max_num_blocks blocks need."""
    num_blocks = 1  # the smallest of each width: the maps stay small
    while num_blocks <= min(max_num_blocks, MAX_BLOCKS):
        importance = torch.zeros((1, num_blocks, num_blocks), device=device)
        select_blocks(
            importance,
            importance,
            first_generation_block=0,
            select=0.5 / num_blocks,
            pattern_rows=torch.arange(num_blocks, dtype=slot_dtype, device=device),
            indices=torch.empty((num_blocks, 1, 1), dtype=index_dtype, device=device),
            counts=torch.empty((num_blocks, 1), dtype=torch.int32, device=device),
        )
        num_blocks = padded_width(num_blocks) + 1


def _check(
    importance: Tensor,
    generation_importance: Tensor,
    first_generation_block: int,
    select: float,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> None:
    if (
        importance.dim() != 3
        or importance.shape[1] != importance.shape[2]
        or importance.dtype != torch.float32
        or not importance.is_contiguous()
    ):
        raise ValueError(
            "importance must be contiguous float32 [num_heads, n, n], got "
            f"{importance.dtype} {tuple(importance.shape)}"
        )
    num_heads, num_blocks, _ = importance.shape
    if not 1 <= num_blocks <= MAX_BLOCKS:
        raise ValueError(f"importance must have 1 to {MAX_BLOCKS} blocks, got {num_blocks}")
    if not 0 <= first_generation_block < num_blocks:
        raise ValueError(
            f"first_generation_block must be in [0, {num_blocks}), got {first_generation_block}"
        )
    if not 0.0 < select <= 1.0:
        raise ValueError(f"select must be in (0, 1], got {select}")
    expected = (num_heads, num_blocks, num_blocks - first_generation_block)
    if (
        generation_importance.shape != expected
        or generation_importance.dtype != torch.float32
        or not generation_importance.is_contiguous()
    ):
        raise ValueError(
            f"generation_importance must be contiguous float32 {expected}, got "
            f"{generation_importance.dtype} {tuple(generation_importance.shape)}"
        )
    if (
        pattern_rows.shape != (num_blocks,)
        or pattern_rows.dtype not in (torch.int32, torch.int64)
        or not pattern_rows.is_contiguous()
    ):
        raise ValueError(
            f"pattern_rows must be contiguous int32 or int64 [{num_blocks}], got "
            f"{pattern_rows.dtype} {tuple(pattern_rows.shape)}"
        )
    if (
        indices.dim() != 3
        or indices.shape[1] != num_heads
        or indices.dtype not in INDEX_DTYPES
        or indices.stride(2) != 1
    ):
        raise ValueError(
            f"indices must be int16 or int32 [pattern rows, {num_heads}, width], rows contiguous, "
            f"got {indices.dtype} {tuple(indices.shape)}"
        )
    if (
        counts.shape != indices.shape[:2]
        or counts.dtype != torch.int32
        or (num_heads > 1 and counts.stride(1) != 1)
    ):
        raise ValueError(
            f"counts must be int32 {tuple(indices.shape[:2])}, got "
            f"{counts.dtype} {tuple(counts.shape)}"
        )
    devices = {x.device for x in (importance, generation_importance, pattern_rows, indices, counts)}
    if len(devices) > 1:
        raise ValueError(f"importance and the others must be on one device, got {devices}")
