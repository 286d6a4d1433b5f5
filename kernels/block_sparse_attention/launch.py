"""Launches the Triton kernels; imported only where they run."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention.configs import (
    HopperConfig,
    hopper_config,
    tile_config,
)
from vllm_sparsed.kernels.block_sparse_attention.kernel import block_sparse_forward
from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles
from vllm_sparsed.kernels.devices import capability_of

_LOG2_E = math.log2(math.e)


@cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    scale: float,
    out: Tensor,
) -> None:
    """Run the fastest kernel that serves these arguments, which `wrapper` has checked."""
    capability = capability_of(q.device)
    hopper = hopper_config(q.shape[2], q.dtype, tiles.block_size, capability)
    if hopper is not None and tiles.min_seq_len >= tiles.block_size and _tma_ready(q, k, v):
        _launch_hopper(q, k, v, indices, counts, tiles, scale, out, hopper)
    else:
        _launch_portable(q, k, v, indices, counts, tiles, scale, out, capability)


def _tma_ready(*tensors: Tensor) -> bool:
    """Whether the heads of a token lie side by side, on the 16 bytes that TMA asks for."""
    return all(
        x.stride(1) == x.shape[2]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in tensors
    )


def _launch_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    scale: float,
    out: Tensor,
    capability: tuple[int, int],
) -> None:
    num_heads, head_dim = q.shape[1:]
    config = tile_config(head_dim, q.dtype, tiles.block_size, capability)
    grid = (tiles.num_rows * (tiles.block_size // config.block_m), num_heads)
    block_sparse_forward[grid](
        q,
        k,
        v,
        out,
        indices,
        counts,
        tiles.seq_start,
        tiles.seq_len,
        tiles.query_block,
        tiles.pattern_row,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        *indices.stride()[:2],
        *counts.stride(),
        scale * _LOG2_E,
        num_heads // k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=tiles.block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@cache
def _gluon() -> Any:
    """Gluon, loaded on first use: it exists for one chip and takes a while to import."""
    from triton.experimental.gluon import language
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return language, TensorDescriptor


@cache
def _tile_layout(rows: int, head_dim: int, dtype: torch.dtype) -> Any:
    language = _gluon()[0]
    element = language.bfloat16 if dtype == torch.bfloat16 else language.float16
    return language.NVMMASharedLayout.get_default_for([rows, head_dim], element)


def _descriptor(x: Tensor, rows: int) -> Any:
    """TMA descriptor of boxes of `rows` tokens of one head."""
    tokens, heads, head_dim = x.shape
    return _gluon()[1](
        x,
        [tokens, heads * head_dim],
        [x.stride(0), 1],
        [rows, head_dim],
        _tile_layout(rows, head_dim, x.dtype),
    )


def _launch_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    scale: float,
    out: Tensor,
    config: HopperConfig,
) -> None:
    num_heads = q.shape[1]
    block_size = tiles.block_size
    pairs = block_size < 64
    tiles_per_head = tiles.group_row.shape[0] if pairs else tiles.num_rows
    num_tiles = tiles_per_head * num_heads
    programs = config.programs_per_sm * _num_sms(q.device) or num_tiles
    arguments = (
        _descriptor(q, max(block_size, 64)),
        _descriptor(k, block_size),
        _descriptor(v, block_size),
        out,
        indices,
        counts,
        tiles.seq_start,
        tiles.seq_len,
        tiles.query_block,
        tiles.pattern_row,
        *out.stride()[:2],
        *indices.stride()[:2],
        *counts.stride(),
        scale * _LOG2_E,
        tiles_per_head,
        num_tiles,
        num_heads // k.shape[1],
    )
    options = {
        "STAGES": config.stages,
        "num_warps": 4,
        "maxnreg": config.max_registers,
    }
    grid = (min(programs, num_tiles),)
    if pairs:
        from vllm_sparsed.kernels.block_sparse_attention.hopper_pair_kernel import (
            block_sparse_forward_sm90_pairs,
        )

        block_sparse_forward_sm90_pairs[grid](*arguments, tiles.group_row, **options)
    else:
        from vllm_sparsed.kernels.block_sparse_attention.hopper_kernel import (
            block_sparse_forward_sm90,
        )

        block_sparse_forward_sm90[grid](
            *arguments,
            BLOCK_SIZE=block_size,
            CONSUMER_REGISTERS=config.consumer_registers,
            **options,
        )
