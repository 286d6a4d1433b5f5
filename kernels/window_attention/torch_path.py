"""Window attention on the CPU: gathers the kept keys of some heads at a time."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.window_attention.window_tiles import Field, WindowTiles

_CHUNK_ELEMENTS: Final = 1 << 22
"""Elements of gathered keys that heads worked on together may hold (16 MiB in float32)."""


def window_attention_torch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    tiles: WindowTiles,
    *,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The serving path for tensors that no Triton kernel can reach.

    Arguments as in `window_attention`. Products and softmax are float32 (float64 for float64
    inputs). Reads kept keys and values alone.
    """
    num_heads, head_dim = q.shape[1:]
    heads_per_kv = num_heads // k_pages.shape[2]
    kv_head_of = torch.arange(num_heads) // heads_per_kv
    for column in tiles.table.T.tolist():
        tile = dict(zip(Field, column, strict=True))
        if tile[Field.NUM_ROWS] == 0:
            continue
        rows = slice(tile[Field.FIRST_ROW], tile[Field.FIRST_ROW] + tile[Field.NUM_ROWS])
        pages = block_table[tile[Field.SEQUENCE]].long()
        pattern_row = tile[Field.PATTERN_ROW]
        if pattern_row < 0:
            # All heads keep the same keys: those that share stored heads share the gathered ones.
            tokens = torch.arange(tile[Field.SEQ_LEN])[None]
            for kv_head in range(k_pages.shape[2]):
                heads = slice(kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv)
                stored_heads = torch.tensor([kv_head])
                k = _gather(k_pages, pages, tokens, stored_heads, k_scale, q.dtype)[0]
                v = _gather(v_pages, pages, tokens, stored_heads, v_scale, q.dtype)[0]
                scores = q[rows, heads].to(k.dtype) @ k.T * scale
                out[rows, heads] = (torch.softmax(scores, dim=-1) @ v).to(out.dtype)
            continue
        assert indices is not None and counts is not None
        tokens, valid = _kept_tokens(
            indices[pattern_row].long(), counts[pattern_row].long(), tile, tiles.block_size
        )
        chunk = max(1, _CHUNK_ELEMENTS // (tokens.shape[1] * head_dim))
        for first in range(0, num_heads, chunk):
            heads = slice(first, first + chunk)
            # Only as far as the longest list of these heads.
            used = int(valid[heads].sum(dim=1).max())
            kept, inside = tokens[heads, :used], valid[heads, :used]
            k = _gather(k_pages, pages, kept, kv_head_of[heads], k_scale, q.dtype)
            v = _gather(v_pages, pages, kept, kv_head_of[heads], v_scale, q.dtype)
            queries = q[rows, heads].transpose(0, 1).to(k.dtype)  # [heads, rows, head_dim]
            scores = torch.bmm(queries, k.transpose(1, 2)).mul_(scale)
            scores.masked_fill_(~inside[:, None], float("-inf"))
            attended = torch.bmm(torch.softmax(scores, dim=-1), v)
            out[rows, heads] = attended.transpose(0, 1).to(out.dtype)
    return out


def _kept_tokens(
    indices: Tensor,  # [heads, width]
    counts: Tensor,  # [heads]
    tile: dict[Field, int],
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Positions of the kept keys of each head, and which of them are valid, valid ones first.

    Both are [heads, keys]; invalid positions repeat a kept one, so that nothing else is read.
    """
    first, num_touched = tile[Field.FIRST_TOUCHED], tile[Field.NUM_TOUCHED]
    width = int(counts.max())
    lists = indices[:, :width]
    listed = torch.arange(width) < counts[:, None]
    listed &= (lists < first) | (lists >= first + num_touched)
    touched = torch.arange(first, first + num_touched).expand(len(counts), -1)
    blocks = torch.cat([touched, lists.masked_fill(~listed, first)], dim=1)
    valid_block = torch.cat([torch.ones_like(touched, dtype=torch.bool), listed], dim=1)
    tokens = (blocks[..., None] * block_size + torch.arange(block_size)).flatten(1)
    valid = valid_block.repeat_interleave(block_size, dim=1) & (tokens < tile[Field.SEQ_LEN])
    order = torch.sort(~valid, dim=1, stable=True).indices
    tokens, valid = tokens.gather(1, order), valid.gather(1, order)
    return tokens.masked_fill(~valid, first * block_size), valid


def _gather(
    x_pages: Tensor,  # [num_pages, page_size, num_kv_heads, head_dim]
    pages: Tensor,  # [pages of the sequence]
    tokens: Tensor,  # [heads, keys], positions in the sequence
    stored_heads: Tensor,  # [heads]
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[heads, keys, head_dim]: stored keys or values in the dtype of computing."""
    page_size = x_pages.shape[1]
    where = (pages[tokens // page_size], tokens % page_size, stored_heads[:, None])
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if scale is None:
        return x_pages[where].to(compute_dtype)
    # PyTorch cannot index float8 with a tensor.
    stored = x_pages.view(torch.uint8)[where].view(x_pages.dtype)
    return stored.to(compute_dtype) * scale.to(compute_dtype)
