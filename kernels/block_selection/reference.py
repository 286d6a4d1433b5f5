"""Selection of key blocks, row by row in plain Python."""

import torch
from torch import Tensor


def select_blocks_reference(
    importance: Tensor, generation_importance: Tensor, *, first_generation_block: int, select: float
) -> Tensor:
    """Kept blocks as a mask, bool [num_heads, n, n]; SparseD (arXiv 2509.24014), both parts' union.

    importance [num_heads, n, n] ranks all columns, of which the prefill columns are kept;
    generation_importance [num_heads, n, n - first_generation_block] ranks the others alone.
    """
    num_heads, num_blocks, _ = importance.shape
    kept = torch.zeros((num_heads, num_blocks, num_blocks), dtype=torch.bool)
    for head in range(num_heads):
        for row in range(num_blocks):
            for column in _top(importance[head, row].tolist(), select):
                if column < first_generation_block:
                    kept[head, row, column] = True
            for column in _top(generation_importance[head, row].tolist(), select):
                kept[head, row, first_generation_block + column] = True
    return kept


def _top(scores: list[float], select: float) -> list[int]:
    """Columns of the highest scores; among equals the lowest column comes first."""
    order = sorted(range(len(scores)), key=lambda column: (-scores[column], column))
    return order[: max(1, int(len(scores) * select) + 1)]
