"""Entry point of the window attention: argument checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FLOATS, FP8, INDEX_DTYPES, has_kernel
from vllm_sparsed.kernels.dimensions import HEAD_DIMS
from vllm_sparsed.kernels.window_attention.torch_path import window_attention_torch
from vllm_sparsed.kernels.window_attention.window_tiles import (
    MAX_SPLITS,
    TILE_ROWS,
    Window,
    WindowTiles,
)


def window_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    tiles: WindowTiles,
    *,
    indices: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """Attention of windows of few rows over the stored keys and values of their sequences.

    A row of a window with pattern attends to the key blocks on the list of its query block, per
    query head (SparseD, arXiv 2509.24014, section 4), and to every key block that the window
    touches, whole; a row of a window without pattern to all keys of its sequence. The keys and
    values of the window itself must be in the pages before. What lies behind the end of a sequence
    on its last page is never read, nor is a page that no row keeps.

    CUDA tensors (and any tensor under Triton's interpreter) go to the Triton kernel, CPU tensors to
    PyTorch. Never waits for the device; may be recorded in a CUDA graph.

    Args:
        q: [rows, num_heads, head_dim], the packed rows, bfloat16, float16 or float32 (IEEE
            products, no TF32); head_dim 16, 32, 64, 80, 96, 128 or 256. The last dimension is
            contiguous, the others may be strided, here as in k_pages, v_pages and out.
        k_pages, v_pages: [num_pages, page_size, num_kv_heads, head_dim], the store of one layer, of
            the dtype of q or float8_e4m3fn; num_heads is a multiple of num_kv_heads. With vLLM's
            store of one layer, [num_pages, num_kv_heads, page_size, 2 * head_dim] in
            FlashAttention's layout: `store.transpose(1, 2).split(head_dim, dim=-1)`.
        block_table: int32 [sequences, pages], the pages of each sequence in order.
        tiles: the rows to compute; page_size is a multiple of its block size.
        indices: int16 or int32 [pattern rows, num_heads, width], ascending key block indices within
            the sequence. None where no window has a pattern.
        counts: int32 [pattern rows, num_heads], how many of the indices are valid.
        scale: factor of the scores before softmax, usually 1 / sqrt(head_dim).
        k_scale, v_scale: float32, one element on the device of q: what stored float8 values are to
            be multiplied with. None for other pages.
        out: [rows, num_heads, head_dim], written for the rows of `tiles` only.

    Returns:
        out.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride.
    """
    _check_tensors(q, k_pages, v_pages, block_table, tiles, out)
    _check_lists(q, tiles, indices, counts)
    _check_scales(q, k_pages, k_scale, v_scale)
    if tiles.num_tiles == 0:
        return out
    if has_kernel(q):
        from vllm_sparsed.kernels.window_attention.launch import launch

        launch(
            q,
            k_pages,
            v_pages,
            block_table,
            tiles,
            indices,
            counts,
            scale,
            k_scale,
            v_scale,
            out,
        )
        return out
    return window_attention_torch(
        q,
        k_pages,
        v_pages,
        block_table,
        tiles,
        indices=indices,
        counts=counts,
        scale=scale,
        k_scale=k_scale,
        v_scale=v_scale,
        out=out,
    )


def workspace_bytes(num_tiles: int, num_heads: int, head_dim: int, max_splits: int) -> int:
    """Device memory that one call takes and gives back, for the results of the splits."""
    if max_splits == 1:
        return 0
    padded = 1 << (head_dim - 1).bit_length()
    return 4 * num_tiles * num_heads * max_splits * TILE_ROWS * (padded + 2)


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_sizes: Sequence[int],
    *,
    k_pages: Tensor,
    v_pages: Tensor,
    index_dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Compile every kernel that windows of these shapes need, so that no pass waits for it.

    Args:
        k_pages, v_pages: the store of one layer, at least one page; its strides and dtype decide
            what is compiled. Its first page is read.

    Does nothing on devices without Triton.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    # One fused tensor, as models hand it over: the strides decide about specialisation.
    qkv = torch.zeros(1, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device)
    scales: list[Tensor | None] = [None, None]
    if k_pages.dtype == FP8:
        scales = [torch.ones(1, device=device)] * 2
    window = Window(0, 1, 0, 1, 0, pattern_rows=[0])
    for block_size in block_sizes:
        window_attention(
            qkv[:, :num_heads],
            k_pages,
            v_pages,
            torch.zeros(1, 1, dtype=torch.int32, device=device),
            WindowTiles.build([window], block_size, num_heads, device, max_splits=MAX_SPLITS),
            indices=torch.zeros(1, num_heads, 1, dtype=index_dtype, device=device),
            counts=torch.ones(1, num_heads, dtype=torch.int32, device=device),
            scale=head_dim**-0.5,
            k_scale=scales[0],
            v_scale=scales[1],
            out=torch.empty(1, num_heads, head_dim, dtype=dtype, device=device),
        )


def _check_tensors(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    tiles: WindowTiles,
    out: Tensor,
) -> None:
    for name, x, shape in (
        ("q", q, "[rows, heads, head_dim]"),
        ("k_pages", k_pages, "[pages, page_size, heads, head_dim]"),
        ("v_pages", v_pages, "[pages, page_size, heads, head_dim]"),
        ("out", out, "[rows, heads, head_dim]"),
    ):
        if x.dim() != shape.count(",") + 1:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    num_heads, head_dim = q.shape[1:]
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q must have a head_dim out of {HEAD_DIMS}, got {head_dim}")
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(
            f"out must be {q.dtype} {tuple(q.shape)} like q, got {out.dtype} {tuple(out.shape)}"
        )
    if k_pages.dtype not in (q.dtype, FP8):
        raise ValueError(f"k_pages must be {q.dtype} like q or {FP8}, got {k_pages.dtype}")
    if k_pages.shape[3] != head_dim:
        raise ValueError(f"k_pages must have a head_dim of {head_dim}, got {k_pages.shape[3]}")
    if v_pages.shape != k_pages.shape or v_pages.dtype != k_pages.dtype:
        raise ValueError(
            f"v_pages must be {k_pages.dtype} {tuple(k_pages.shape)} like k_pages, "
            f"got {v_pages.dtype} {tuple(v_pages.shape)}"
        )
    if k_pages.shape[2] == 0 or num_heads % k_pages.shape[2]:
        raise ValueError(f"q has {num_heads} heads, no multiple of the {k_pages.shape[2]} stored")
    if k_pages.shape[1] % tiles.block_size:
        raise ValueError(
            f"k_pages must have pages of a multiple of the block size {tiles.block_size}, "
            f"got {k_pages.shape[1]}"
        )
    if (
        block_table.dim() != 2
        or block_table.dtype != torch.int32
        or (block_table.shape[1] > 1 and block_table.stride(1) != 1)
    ):
        raise ValueError(
            "block_table must be int32 [sequences, pages], rows contiguous, "
            f"got {block_table.dtype} {tuple(block_table.shape)}"
        )
    for name, x in (
        ("k_pages", k_pages),
        ("v_pages", v_pages),
        ("block_table", block_table),
        ("tiles", tiles.table),
        ("out", out),
    ):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")


def _check_lists(
    q: Tensor, tiles: WindowTiles, indices: Tensor | None, counts: Tensor | None
) -> None:
    if indices is None or counts is None:
        if tiles.has_patterns or indices is not counts:
            raise ValueError("indices and counts must both be given to windows with patterns")
        return
    num_heads = q.shape[1]
    if indices.dim() != 3 or indices.shape[1] != num_heads:
        raise ValueError(
            f"indices must be [pattern rows, {num_heads}, width], got {tuple(indices.shape)}"
        )
    if indices.dtype not in INDEX_DTYPES:
        raise ValueError(f"indices must be int16 or int32, got {indices.dtype}")
    if indices.stride(2) != 1:
        raise ValueError("indices must be contiguous in its last dimension")
    if counts.shape != indices.shape[:2] or counts.dtype != torch.int32:
        raise ValueError(
            f"counts must be int32 {tuple(indices.shape[:2])} to fit indices, "
            f"got {counts.dtype} {tuple(counts.shape)}"
        )
    for name, x in (("indices", indices), ("counts", counts)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")


def _check_scales(
    q: Tensor, k_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> None:
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_pages.dtype != FP8:
            if x is not None:
                raise ValueError(f"{name} must be None for pages of {k_pages.dtype}")
        elif x is None or x.numel() != 1 or x.dtype != torch.float32 or x.device != q.device:
            raise ValueError(f"{name} must be one float32 on {q.device} for pages of {FP8}")
