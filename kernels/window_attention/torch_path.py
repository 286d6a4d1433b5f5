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
            k = _gather(k_pages, pages, tokens[heads], kv_head_of[heads], k_scale, q.dtype)
            v = _gather(v_pages, pages, tokens[heads], kv_head_of[heads], v_scale, q.dtype)
            queries = q[rows, heads].transpose(0, 1).to(k.dtype)  # [heads, rows, head_dim]
            scores = torch.bmm(queries, k.transpose(1, 2)).mul_(scale)
            scores.masked_fill_(~valid[heads, None], float("-inf"))
            attended = torch.bmm(torch.softmax(scores, dim=-1), v)
            out[rows, heads] = attended.transpose(0, 1).to(out.dtype)
    return out


def _kept_tokens(
    indices: Tensor,  # [heads, width]
    counts: Tensor,  # [heads]
    tile: dict[Field, int],
    block_size: int,
) -> tuple[Tensor, Tensor]:
    """Positions of the kept keys of each head, and which of them are valid, both [heads, keys].

    Invalid positions repeat a kept one, so that nothing else is read.
    """
    first, num_touched = tile[Field.FIRST_TOUCHED], tile[Field.NUM_TOUCHED]
    width = int(counts.max())
    lists = indices[:, :width]
    listed = torch.arange(width) < counts[:, None]
    listed &= (lists < first) | (lists >= first + num_touched)
    touched = torch.arange(first, first + num_touched).expand(len(counts), -1)
    blocks = torch.cat([touched, lists.masked_fill(~listed, first)], dim=1)
    kept = torch.cat([torch.ones_like(touched, dtype=torch.bool), listed], dim=1)
    tokens = blocks[..., None] * block_size + torch.arange(block_size)
    valid = kept[..., None] & (tokens < tile[Field.SEQ_LEN])
    tokens.masked_fill_(~valid, first * block_size)
    return tokens.flatten(1), valid.flatten(1)


def _gather(
    x_pages: Tensor,  # [num_pages, page_size, num_kv_heads, head_dim]
    pages: Tensor,  # [pages of the sequence]
    tokens: Tensor,  # [heads, keys], positions in the sequence
    stored_heads: Tensor,  # [heads]
    scale: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[heads, keys, head_dim]: stored keys or values in the dtype of computing."""
    page_size, head_dim = x_pages.shape[1], x_pages.shape[3]
    # PyTorch cannot index float8 with a tensor.
    bits = x_pages if scale is None else x_pages.view(torch.uint8)
    where = (pages[tokens // page_size], tokens % page_size, stored_heads[:, None])
    if any(x % head_dim for x in (bits.storage_offset(), *bits.stride()[:3])):
        stored = bits[where]
    else:
        # The memory as rows of head_dim elements: rows are copied faster than indexed.
        num_rows = bits.untyped_storage().nbytes() // bits.element_size() // head_dim
        rows = bits.as_strided((num_rows, head_dim), (head_dim, 1), 0)
        row = torch.full_like(tokens, bits.storage_offset() // head_dim)
        for index, stride in zip(where, bits.stride()[:3], strict=True):
            row = row + index * (stride // head_dim)
        stored = rows.index_select(0, row.flatten()).view(*tokens.shape, head_dim)
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    if scale is None:
        return stored.to(compute_dtype)
    return stored.view(x_pages.dtype).to(compute_dtype) * scale.to(compute_dtype)
