"""CPU serving path of the block importance: PyTorch, a bounded number of query rows at a time."""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad

# Bytes of the largest temporary: the float32 scores of one chunk of query rows.
SCORE_BYTES: Final = 64 * 2**20


def block_importance_torch(
    q: Tensor, k: Tensor, *, first_generation_block: int, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Arguments and results of `block_importance`; always computes its own softmax, in float32."""
    seq_len, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    num_blocks = -(-seq_len // block_size)
    generation_start = first_generation_block * block_size
    importance = torch.empty(
        (num_heads, num_blocks, num_blocks), dtype=torch.float32, device=q.device
    )
    generation = torch.empty(
        (num_heads, num_blocks, num_blocks - first_generation_block),
        dtype=torch.float32,
        device=q.device,
    )
    keys = k.float().permute(1, 2, 0)  # [num_kv_heads, D, L]
    queries = q.float().transpose(0, 1)  # [num_heads, L, D]
    chunk = max(1, SCORE_BYTES // (4 * num_heads * seq_len * block_size))
    for first in range(0, num_blocks, chunk):
        rows = queries[:, first * block_size : (first + chunk) * block_size]
        grouped = rows.reshape(num_kv_heads, -1, head_dim)
        scores = torch.matmul(grouped, keys).mul_(scale).view(num_heads, -1, seq_len)
        last = min(first + chunk, num_blocks)
        generation[:, first:last] = _block_mean(
            scores[:, :, generation_start:].softmax(dim=-1), block_size
        )
        importance[:, first:last] = _block_mean(scores.softmax(dim=-1), block_size)
    return importance, generation


def _block_mean(probabilities: Tensor, block_size: int) -> Tensor:
    """[H, rows, columns] -> [H, row blocks, column blocks], summing columns first."""
    num_heads, rows, columns = probabilities.shape
    wide = pad(probabilities, (0, -columns % block_size))
    row_sums = wide.view(num_heads, rows, -1, block_size).sum(dim=-1)
    tall = pad(row_sums, (0, 0, 0, -rows % block_size))
    sums = tall.view(num_heads, -1, block_size, tall.shape[-1]).sum(dim=2)
    return sums.div_(block_size * block_size)
