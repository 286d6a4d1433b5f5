"""Block-sparse attention on the CPU: gathers the kept key blocks, never an L x L mask."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles

_CHUNK_ELEMENTS: Final = 1 << 22
"""Elements of the gathered keys, or of the scores, that one chunk may hold (16 MiB in float32)."""


def block_sparse_attention_torch(
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
    """The serving path for tensors that no Triton kernel can reach.

    Arguments as in `block_sparse_attention`. Products and softmax are float32 (float64 for float64
    inputs); work is done in chunks of rows and heads, so that extra memory is bounded by the packed
    keys and values plus a few chunks.
    """
    block_size = tiles.block_size
    first_rows = torch.nonzero(tiles.query_block == 0).flatten().tolist()
    for first_row in first_rows:
        start, length = int(tiles.seq_start[first_row]), int(tiles.seq_len[first_row])
        num_blocks = -(-length // block_size)
        slots = tiles.pattern_row[first_row : first_row + num_blocks].long()
        tokens = slice(start, start + length)
        for kv_head in range(k.shape[1]):
            heads_per_kv = q.shape[1] // k.shape[1]
            heads = slice(kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv)
            _attend_heads(
                _in_blocks(q[tokens, heads].transpose(0, 1), block_size),
                _in_blocks(k[tokens, kv_head], block_size),
                _in_blocks(v[tokens, kv_head], block_size),
                indices[slots, heads].long(),
                counts[slots, heads].long(),
                length,
                scale,
                out[tokens, heads],
            )
    return out


def _in_blocks(x: Tensor, block_size: int) -> Tensor:
    """[..., length, head_dim] -> [..., num_blocks, block_size, head_dim], zero padded."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    padding = -x.shape[-2] % block_size
    return F.pad(x.to(compute_dtype), (0, 0, 0, padding)).unflatten(-2, (-1, block_size))


def _attend_heads(
    q: Tensor,  # [heads, num_blocks, block_size, head_dim]
    k: Tensor,  # [num_blocks, block_size, head_dim]
    v: Tensor,  # [num_blocks, block_size, head_dim]
    indices: Tensor,  # [num_blocks, heads, width]
    counts: Tensor,  # [num_blocks, heads]
    length: int,
    scale: float,
    out: Tensor,  # [length, heads, head_dim], written
) -> None:
    """The query heads that share one key-value head, for one request."""
    block_size, head_dim = k.shape[1:]
    # Rows of similar length side by side: a chunk is padded to its longest list.
    order = torch.argsort(counts.flatten(), stable=True)
    sorted_counts = counts.flatten()[order].tolist()
    heads = counts.shape[1]
    lists = indices.flatten(0, 1)
    begin = 0
    while begin < len(sorted_counts):
        end = begin + 1
        per_row = max(sorted_counts[begin], 1) * block_size * max(head_dim, block_size)
        limit = max(1, _CHUNK_ELEMENTS // per_row)
        while (
            end < len(sorted_counts)
            and end - begin < limit
            and sorted_counts[end] <= 1.25 * sorted_counts[begin] + 1
        ):
            end += 1
        rows = order[begin:end]
        width = sorted_counts[end - 1]
        block, head = rows // heads, rows % heads
        first = block * block_size
        queries = q[head, block]  # [rows, block_size, head_dim]
        if width == 0:
            attended = torch.zeros_like(queries)
        else:
            attended = _attend_chunk(
                queries, k, v, lists[rows, :width], counts[block, head], length, scale
            )
        token = (first[:, None] + torch.arange(block_size)).flatten()
        inside = token < length
        heads_of_tokens = head.repeat_interleave(block_size)
        out[token[inside], heads_of_tokens[inside]] = attended.flatten(0, 1)[inside].to(out.dtype)
        begin = end


def _attend_chunk(
    queries: Tensor,  # [rows, block_size, head_dim]
    k: Tensor,  # [num_blocks, block_size, head_dim]
    v: Tensor,
    lists: Tensor,  # [rows, width]
    counts: Tensor,  # [rows]
    length: int,
    scale: float,
) -> Tensor:
    block_size = k.shape[1]
    listed = torch.arange(lists.shape[1]) < counts[:, None]  # [rows, width]
    lists = lists.masked_fill(~listed, 0)
    key_position = lists[..., None] * block_size + torch.arange(block_size)
    valid = (listed[..., None] & (key_position < length)).flatten(1)  # [rows, width * block_size]
    scores = torch.bmm(queries, k[lists].flatten(1, 2).transpose(1, 2)).mul_(scale)
    scores.masked_fill_(~valid[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    if not bool(listed[:, 0].all()):
        # A row without any kept block has only -inf: its output is defined as 0.
        weights = weights.nan_to_num_(nan=0.0)
    return torch.bmm(weights, v[lists].flatten(1, 2))
