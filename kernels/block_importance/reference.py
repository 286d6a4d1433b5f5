"""Block importance from the full softmax: slow, quadratic in memory, and easy to check by eye."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_importance_reference(
    q: Tensor, k: Tensor, *, first_generation_block: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Importance of every key block for every query block (SparseD, arXiv 2509.24014, section 4).

    q [L, num_heads, D], k [L, num_kv_heads, D], computed in their common dtype throughout.
    Returns the map over all keys [num_heads, n, n] and the map of the softmax over the generation
    keys alone [num_heads, n, n - first_generation_block].
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    generation_scores = scores[:, :, first_generation_block * block_size :]
    return (
        _block_mean(scores.softmax(dim=-1), block_size),
        _block_mean(generation_scores.softmax(dim=-1), block_size),
    )


def _block_mean(probabilities: Tensor, block_size: int) -> Tensor:
    """[H, rows, columns] -> [H, row blocks, column blocks]; what lies outside counts as zeros."""
    num_heads, rows, columns = probabilities.shape
    padded = pad(probabilities, (0, -columns % block_size, 0, -rows % block_size))
    blocks = padded.view(
        num_heads, padded.shape[1] // block_size, block_size, padded.shape[2] // block_size, -1
    )
    return blocks.sum(dim=(2, 4)) / (block_size * block_size)
