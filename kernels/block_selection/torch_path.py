"""CPU serving path of the selection."""

import torch
from torch import Tensor


def select_blocks_torch(
    importance: Tensor,
    generation_importance: Tensor,
    *,
    first_generation_block: int,
    num_kept: int,
    num_kept_generation: int,
    pattern_rows: Tensor,
    indices: Tensor,
    counts: Tensor,
) -> None:
    """Arguments of `select_blocks`, with the numbers of columns to keep worked out."""
    kept = _top_mask(importance, num_kept)
    kept[:, :, first_generation_block:] = _top_mask(generation_importance, num_kept_generation)
    row_counts = kept.sum(dim=-1)  # [num_heads, n]
    width = int(row_counts.max())
    # Kept columns first, in their order: a stable sort of the complement.
    lists = torch.sort(~kept, dim=-1, stable=True).indices[:, :, :width]
    valid = torch.arange(width, device=kept.device) < row_counts.unsqueeze(-1)
    slots = pattern_rows.long()
    rows = indices[slots, :, :width]  # what lies behind a row's count stays as it was
    rows = torch.where(valid.transpose(0, 1), lists.transpose(0, 1).to(indices.dtype), rows)
    indices[slots, :, :width] = rows
    counts[slots] = row_counts.T.to(torch.int32)


def _top_mask(scores: Tensor, num_kept: int) -> Tensor:
    """bool like scores: the highest per row, the lowest index first among equals."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :, :num_kept]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
