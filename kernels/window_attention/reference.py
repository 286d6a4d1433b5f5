"""Window attention in plain PyTorch with a dense mask: what kernels are tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_sparsed.kernels.window_attention.window_tiles import Window


def window_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    windows: Sequence[Window],
    *,
    block_size: int,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """softmax(q k^T * scale + mask) v per window, row and head, in the dtype of q.

    The mask is 0 in kept key blocks and -inf elsewhere. A row keeps the blocks on the list of its
    query block (SparseD, arXiv 2509.24014, section 4) and those that its window touches; without a
    pattern, all. Arguments as in `window_attention`, but for the windows themselves in the place of
    their tiles.
    """
    heads_per_kv = q.shape[1] // k_pages.shape[2]
    for window in windows:
        pages = block_table[window.sequence].long()
        k = _stored(k_pages, pages, window.seq_len, q.dtype, k_scale)
        v = _stored(v_pages, pages, window.seq_len, q.dtype, v_scale)
        key_block = torch.arange(window.seq_len, device=q.device) // block_size
        end = window.first_position + window.num_rows
        first_block, last_block = window.first_position // block_size, (end - 1) // block_size
        touched = (key_block >= first_block) & (key_block <= last_block)
        for query_block in range(first_block, last_block + 1):
            positions = range(
                max(window.first_position, query_block * block_size),
                min(end, (query_block + 1) * block_size),
            )
            first_row = window.first_row + positions.start - window.first_position
            rows = slice(first_row, first_row + len(positions))
            for head in range(q.shape[1]):
                kept = torch.ones_like(touched)
                if window.pattern_rows:
                    assert indices is not None and counts is not None
                    pattern_row = window.pattern_rows[query_block - first_block]
                    listed = indices[pattern_row, head, : int(counts[pattern_row, head])]
                    kept = touched | torch.isin(key_block, listed.long())
                keys, values = (x[kept, head // heads_per_kv] for x in (k, v))
                weights = torch.softmax((q[rows, head] @ keys.T) * scale, dim=-1)
                out[rows, head] = weights @ values
    return out


def _stored(
    x_pages: Tensor, pages: Tensor, seq_len: int, dtype: torch.dtype, scale: Tensor | None
) -> Tensor:
    """[seq_len, num_kv_heads, head_dim]: a sequence's stored keys or values in order."""
    num_pages = -(-seq_len // x_pages.shape[1])
    # Read page by page: PyTorch cannot index float8 with a tensor.
    x = torch.cat([x_pages[page].to(dtype) for page in pages[:num_pages].tolist()])[:seq_len]
    return x if scale is None else x * scale.to(dtype)
