"""Launches the Triton kernels of the window attention; imported only where they run."""

from __future__ import annotations

import math
from typing import Final

import torch
import triton
from torch import Tensor

from vllm_sparsed.kernels.devices import FP8, capability_of
from vllm_sparsed.kernels.window_attention.configs import (
    COMBINED_ROWS,
    has_fp8_conversion,
    tile_config,
)
from vllm_sparsed.kernels.window_attention.kernel import combine_splits, window_forward
from vllm_sparsed.kernels.window_attention.window_tiles import TILE_ROWS, WindowTiles

_LOG2_E: Final = math.log2(math.e)


def launch(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    tiles: WindowTiles,
    indices: Tensor | None,
    counts: Tensor | None,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> None:
    """Run the kernels on arguments that `wrapper` has checked."""
    num_heads, head_dim = q.shape[1:]
    capability = capability_of(q.device)
    config = tile_config(head_dim, q.dtype, capability)
    fp8 = ""
    if k_pages.dtype == FP8:
        native = q.is_cuda and has_fp8_conversion(capability)
        fp8 = "native" if native else "bits"
        if not native:
            k_pages, v_pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8)
    block_d = triton.next_power_of_2(head_dim)
    # In the place of what is not there and not read; of the dtype that is usual there, so that
    # nothing is compiled a second time.
    nothing = tiles.table.view(torch.float32)
    partial = statistics = nothing
    if tiles.max_splits > 1:
        shape = (tiles.num_tiles, num_heads, tiles.max_splits)
        partial = torch.empty((*shape, TILE_ROWS, block_d), dtype=torch.float32, device=q.device)
        statistics = torch.empty((*shape, 2, TILE_ROWS), dtype=torch.float32, device=q.device)
    no_lists = tiles.table.view(torch.int16)
    scales = (nothing if k_scale is None else k_scale, nothing if v_scale is None else v_scale)
    options = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "FP8": fp8,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }
    window_forward[(tiles.num_tiles * (TILE_ROWS // config.block_m), num_heads, tiles.max_splits)](
        q,
        k_pages,
        v_pages,
        out,
        partial,
        statistics,
        no_lists if indices is None else indices,
        tiles.table if counts is None else counts,
        block_table,
        tiles.table,
        *scales,
        *q.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        *out.stride()[:2],
        *((0, 0) if indices is None else indices.stride()[:2]),
        *((0, 0) if counts is None else counts.stride()),
        block_table.stride(0),
        tiles.num_tiles,
        num_heads // k_pages.shape[2],
        scale * _LOG2_E,
        BLOCK_SIZE=tiles.block_size,
        PAGE_SIZE=k_pages.shape[1],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )
    if tiles.max_splits > 1:
        combine_splits[(tiles.num_tiles * (TILE_ROWS // COMBINED_ROWS), num_heads)](
            partial,
            statistics,
            out,
            tiles.table,
            *scales,
            *out.stride()[:2],
            tiles.num_tiles,
            tiles.max_splits,
            scale * _LOG2_E,
            ROWS=COMBINED_ROWS,
            num_warps=4,
            **options,
        )
