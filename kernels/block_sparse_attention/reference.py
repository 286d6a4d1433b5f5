"""Block-sparse attention in plain PyTorch with a dense mask: what kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles


def block_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    *,
    scale: float,
    out: Tensor,
) -> Tensor:
    """softmax(q k^T * scale + mask) v per request and head, in the dtype of the inputs.

    The mask is 0 in kept blocks and -inf elsewhere (SparseD, arXiv 2509.24014, section 4).
    Arguments as in `block_sparse_attention`; memory grows with the square of the longest request.
    """
    block_size = tiles.block_size
    heads_per_kv = q.shape[1] // k.shape[1]
    for first_row in torch.nonzero(tiles.query_block == 0).flatten().tolist():
        start, length = int(tiles.seq_start[first_row]), int(tiles.seq_len[first_row])
        num_blocks = -(-length // block_size)
        slots = tiles.pattern_row[first_row : first_row + num_blocks].long()
        listed = torch.arange(indices.shape[2], device=q.device) < counts[slots, ..., None]
        # Entries beyond the count go to a column of their own, which is cut off.
        columns = indices[slots].long().masked_fill(~listed, num_blocks)
        kept = torch.zeros(*columns.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device)
        kept = kept.scatter_(2, columns, True)[..., :num_blocks]  # [query block, head, key block]
        tokens = slice(start, start + length)
        for head in range(q.shape[1]):
            mask = kept[:, head].repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
            keys, values = k[tokens, head // heads_per_kv], v[tokens, head // heads_per_kv]
            scores = (q[tokens, head] @ keys.T) * scale
            scores = scores.masked_fill(~mask[:length, :length], float("-inf"))
            # A row without any kept block has only -inf: its output is defined as 0.
            weights = torch.softmax(scores, dim=-1).nan_to_num(nan=0.0)
            out[tokens, head] = weights @ values
    return out
