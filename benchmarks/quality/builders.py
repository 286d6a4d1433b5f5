"""Patterns to compare SparseD's with, each with as many blocks as SparseD's in the same row.

Every builder has the signature and the store of `vllm_sparsed`'s `build_pattern`, and nothing in
them waits for the device.
"""

from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from vllm_sparsed.attention.implementation import PatternBuilder
from vllm_sparsed.kernels.block_importance import block_importance
from vllm_sparsed.kernels.block_selection import select_blocks
from vllm_sparsed.kernels.pattern_building import build_pattern, generation_start_block


def window_blocks(counts: Tensor, width: int) -> Tensor:
    """Key blocks round each query block.

    Args:
        counts: int [n, heads], blocks that a row keeps.
        width: of the lists.

    Returns:
        int64 [n, heads, width], ascending; the first `counts` of each list are valid. The window
        has the query block in its middle, an odd one out after it, and is moved inwards at the
        ends of the sequence.
    """
    kept = counts.long()
    num_blocks = kept.shape[0]
    rows = torch.arange(num_blocks, device=kept.device)[:, None]
    first = (rows - (kept - 1) // 2).clamp(min=0).minimum(num_blocks - kept)
    return first[..., None] + torch.arange(width, device=kept.device)


def sink_window_blocks(counts: Tensor, width: int) -> Tensor:
    """The first key block and a window of the others: arguments and lists of `window_blocks`.

    A row of a single block keeps its own one.
    """
    kept = counts.long()
    num_blocks = kept.shape[0]
    rows = torch.arange(num_blocks, device=kept.device)[:, None]
    window = kept - 1
    first = (rows - (window - 1) // 2).clamp(min=1).minimum(num_blocks - window)
    places = torch.arange(width, device=kept.device)
    blocks = torch.where(places == 0, 0, first[..., None] - 1 + places)
    return torch.where((kept == 1)[..., None], rows[..., None], blocks)


def build_window(
    q: Tensor,
    k: Tensor,
    *,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
    **others: Any,
) -> None:
    """Sliding window (Beltagy et al., arXiv 2004.05150); arguments of `build_pattern`."""
    build_pattern(q, k, pattern_rows=pattern_rows, indices=indices, counts=counts, **others)
    slots = pattern_rows.long()
    indices[slots] = window_blocks(counts[slots], indices.shape[2]).to(indices.dtype)


def build_sink_window(
    q: Tensor,
    k: Tensor,
    *,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
    **others: Any,
) -> None:
    """StreamingLLM (Xiao et al., arXiv 2309.17453), in blocks; arguments of `build_pattern`."""
    build_pattern(q, k, pattern_rows=pattern_rows, indices=indices, counts=counts, **others)
    slots = pattern_rows.long()
    indices[slots] = sink_window_blocks(counts[slots], indices.shape[2]).to(indices.dtype)


def build_shared_heads(
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
    """SparseD's selection on the importance averaged over heads; arguments of `build_pattern`.

    Keeps as many columns of each part as SparseD; how many of the best lie in the generation part,
    and are dropped for its own, depends on the scores, so the density is equal in the mean only.
    """
    first = generation_start_block(q.shape[0], canvas_len, block_size)
    maps = block_importance(
        q, k, first_generation_block=first, block_size=block_size, scale=scale, lse=lse
    )
    importance, generation = (m.mean(dim=0, keepdim=True).expand_as(m).contiguous() for m in maps)
    select_blocks(
        importance,
        generation,
        first_generation_block=first,
        select=select,
        pattern_rows=pattern_rows,
        indices=indices,
        counts=counts,
    )


def build_joint_selection(
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
    """The best of all columns by one softmax, as many as SparseD; arguments of `build_pattern`."""
    first = generation_start_block(q.shape[0], canvas_len, block_size)
    importance, generation = block_importance(
        q, k, first_generation_block=first, block_size=block_size, scale=scale, lse=lse
    )
    select_blocks(
        importance,
        generation,
        first_generation_block=first,
        select=select,
        pattern_rows=pattern_rows,
        indices=indices,
        counts=counts,
    )
    slots = pattern_rows.long()
    lists = best_blocks(importance, counts[slots])
    width = min(lists.shape[2], indices.shape[2])
    indices[slots, :, :width] = lists[..., :width].to(indices.dtype)


def best_blocks(importance: Tensor, counts: Tensor) -> Tensor:
    """The highest columns of each row, the lowest index first among equals.

    Args:
        importance: float32 [heads, n, n].
        counts: int [n, heads], columns that a row keeps.

    Returns:
        int64 [n, heads, n], ascending; the first `counts` of each list are valid.
    """
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    kept = torch.arange(importance.shape[-1], device=counts.device) < counts.T[..., None]
    mask = torch.zeros_like(kept).scatter_(-1, order, kept)
    return torch.sort(~mask, dim=-1, stable=True).indices.transpose(0, 1)


BUILDERS: Final = MappingProxyType[str, PatternBuilder](
    {
        "dense": build_pattern,
        "sparsed": build_pattern,
        "window": build_window,
        "sink_window": build_sink_window,
        "shared_heads": build_shared_heads,
        "joint_selection": build_joint_selection,
    }
)
"""By the names of `settings.PATTERNS`."""
