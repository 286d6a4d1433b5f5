"""Block-sparse attention of one request through FlashAttention 4, as vLLM's CUDA build ships it.

Its forward takes lists of whole key blocks (`full_block_*`) and of blocks that it masks element by
element (`mask_block_*`, empty here). It starts with the last entry of a list, and there it masks
the keys behind the end of the sequence; lists are ascending, so a partly filled last block is
masked wherever it is kept. One launch serves one request: its keys are then all that the kernel
can read, while a launch over packed requests loads the values that follow a partly filled block,
and multiplies another request's NaN by zero.

Each query block of a head is one thread block that goes through its list in order and adds nothing
up with others, so a request's result does not depend on what runs beside it.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles
from vllm_sparsed.kernels.block_sparse_attention.wrapper import block_sparse_attention
from vllm_sparsed.kernels.devices import FLOATS_16_BIT

BLOCK_SIZE: Final = 128
"""Tokens of a pattern block: those of its tile, for queries and for keys."""

HEAD_DIM: Final = 128
CAPABILITY: Final = (9, 0)

_CHECKED_TOKENS: Final = 5 * BLOCK_SIZE - 51


def installed() -> bool:
    """Whether vLLM's copy and the packages that it compiles with are there; imports none of it."""
    vllm = find_spec("vllm")
    if vllm is None or vllm.origin is None:
        return False
    interface = Path(vllm.origin).parent / "vllm_flash_attn" / "cute" / "interface.py"
    return interface.is_file() and all(find_spec(name) for name in ("cutlass", "quack"))


def serves(head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]) -> bool:
    """Whether it is made for these dimensions and this chip.

    Its sparse blocks are its tiles, 128 x 128 at head_dim 128 on compute capability 9.0. Other
    dimensions have other tiles, newer chips take two query tiles at once, and older ones ignore
    the lists.
    """
    return (
        head_dim == HEAD_DIM
        and dtype in FLOATS_16_BIT
        and block_size == BLOCK_SIZE
        and capability == CAPABILITY
    )


def flash_attention_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    pattern_rows: Tensor,
    *,
    scale: float,
    out: Tensor,
) -> Tensor:
    """Attention of every query block of ONE request over its kept key blocks alone.

    Never waits for the device; may be recorded in a CUDA graph once these shapes have been
    compiled, which `check` does.

    Args:
        q: [tokens, num_heads, 128], bfloat16 or float16, at least one token. The heads of a token
            may be part of a longer row, as in k, v and out; rows start on 16 bytes, or they are
            copied.
        k, v: [tokens, num_kv_heads, 128].
        indices: int16 or int32 [pattern rows, num_heads, width], ascending key block indices
            within the request; last dimension contiguous.
        counts: int32 [pattern rows, num_heads], how many of them are valid, at least 1.
        pattern_rows: int32 or int64 [ceil(tokens / 128)], each query block's row of both.
        scale: factor of the scores before softmax.
        out: [tokens, num_heads, 128], written.

    Returns:
        out.

    Raises:
        ValueError: tensors that do not fit together.
    """
    num_blocks = -(-q.shape[0] // BLOCK_SIZE)
    if pattern_rows.shape != (num_blocks,):
        raise ValueError(
            f"pattern_rows must be [{num_blocks}], one per query block, "
            f"got {tuple(pattern_rows.shape)}"
        )
    if indices.shape[:2] != counts.shape or indices.shape[1] != q.shape[1]:
        raise ValueError(
            f"indices must be [pattern rows, {q.shape[1]}, width] and counts fit them, got "
            f"{tuple(indices.shape)} and {tuple(counts.shape)}"
        )
    forward, tensors_type = _interface()
    lists, num_kept = gather_lists(indices, counts, pattern_rows)
    forward(
        q[None],
        k[None],
        v[None],
        softmax_scale=scale,
        causal=False,
        # Heads that share keys have lists of their own.
        pack_gqa=False,
        num_splits=1,
        block_sparse_tensors=tensors_type(
            mask_block_cnt=num_kept[0],
            # With counts of 0 nothing is read here.
            mask_block_idx=lists,
            full_block_cnt=num_kept[1],
            full_block_idx=lists,
            block_size=(BLOCK_SIZE, BLOCK_SIZE),
        ),
        out=out[None],
    )
    return out


def gather_lists(indices: Tensor, counts: Tensor, pattern_rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lists of one request as FlashAttention 4 reads them; one launch.

    Args:
        indices: int16 or int32 [pattern rows, num_heads, width], last dimension contiguous.
        counts: int32 [pattern rows, num_heads].
        pattern_rows: int32 or int64 [num_rows], the request's rows of both.

    Returns:
        The lists, int32 [1, num_heads, num_rows, min(width, num_rows)], undefined behind each
        list's end; and int32 [2, 1, num_heads, num_rows]: zeros, then the counts.
    """
    import triton

    from vllm_sparsed.kernels.block_sparse_attention.list_kernel import gather_lists_kernel

    num_heads = counts.shape[1]
    num_rows = pattern_rows.shape[0]
    width = min(indices.shape[2], num_rows)
    shape = (1, num_heads, num_rows)
    lists = torch.empty((*shape, width), dtype=torch.int32, device=indices.device)
    num_kept = torch.empty((2, *shape), dtype=torch.int32, device=indices.device)
    # Of the store, which stays: compiled once.
    padded_width = triton.next_power_of_2(indices.shape[2])
    gather_lists_kernel[(num_rows, num_heads)](
        indices,
        counts,
        pattern_rows,
        lists,
        num_kept,
        num_rows,
        width,
        *indices.stride()[:2],
        *counts.stride(),
        PADDED_WIDTH=padded_width,
        num_warps=min(8, max(1, padded_width // 256)),
    )
    return lists, num_kept


def check(
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    *,
    width: int,
    index_dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Compile for these shapes and compare with this package's kernel, on a ragged request.

    Args:
        width: of the pattern store, for which the lists' kernel is compiled.
        index_dtype: of the pattern store.

    Raises:
        RuntimeError: the results differ by more than rounding. What importing or compiling raises
            comes through as it is.
    """
    generator = torch.Generator(device).manual_seed(0)
    heads = [num_heads, num_kv_heads, num_kv_heads]
    tokens = _CHECKED_TOKENS
    shape = (tokens, sum(heads), HEAD_DIM)
    qkv = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    q, k, v = qkv.split(heads, dim=1)
    rows = -(-tokens // BLOCK_SIZE)
    # Rows keep two blocks, the partly filled last one or the first two: both ends of the lists.
    indices = torch.zeros(rows, num_heads, max(width, 2), dtype=index_dtype, device=device)
    indices[:, :, 1] = 1
    indices[::2, :, 1] = rows - 1
    counts = torch.full((rows, num_heads), 2, dtype=torch.int32, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    scale = HEAD_DIM**-0.5
    theirs = torch.empty(tokens, num_heads, HEAD_DIM, dtype=dtype, device=device)
    ours = torch.empty_like(theirs)
    flash_attention_4(q, k, v, indices, counts, slots, scale=scale, out=theirs)
    tiles = QueryTiles.build([0], [tokens], [range(rows)], BLOCK_SIZE, device)
    block_sparse_attention(q, k, v, indices, counts, tiles, scale=scale, out=ours)
    error = (theirs.float() - ours.float()).abs().max().item()
    allowed = 4 * torch.finfo(dtype).eps * ours.float().abs().max().item()
    if not error <= allowed:
        raise RuntimeError(
            f"FlashAttention 4 differs by {error:.2e} from this package's kernel, "
            f"{allowed:.2e} is what rounding explains"
        )


@cache
def _interface() -> tuple[Any, Any]:
    """Its forward and its class of lists; importing them takes seconds."""
    from vllm.vllm_flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_fwd

    return _flash_attn_fwd, BlockSparseTensorsTorch
