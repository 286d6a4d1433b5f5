"""Entry point of the block-sparse attention: argument checks and dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles
from vllm_sparsed.kernels.block_sparse_attention.torch_path import block_sparse_attention_torch
from vllm_sparsed.kernels.devices import FLOATS, INDEX_DTYPES, has_kernel
from vllm_sparsed.kernels.dimensions import HEAD_DIMS


def block_sparse_attention(
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
    """Attention of every query block over its kept key blocks alone (SparseD, arXiv 2509.24014).

    One launch covers all requests of `tiles`. CUDA tensors (and any tensor under Triton's
    interpreter) go to the Triton kernels, CPU tensors to PyTorch.

    Args:
        q: [tokens, num_heads, head_dim], bfloat16, float16 or float32 (IEEE products, no TF32);
            head_dim 16, 32, 64, 80, 96, 128 or 256. The last dimension is contiguous, the others
            may be strided, here as in k, v and out.
        k, v: [tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads.
        indices: int16 or int32 [pattern_rows, num_heads, width], ascending key block indices within
            the request.
        counts: int32 [pattern_rows, num_heads], how many of the indices are valid. A count of 0
            writes zeros.
        tiles: the pattern rows to compute.
        scale: factor of the scores before softmax, usually 1 / sqrt(head_dim).
        out: [tokens, num_heads, head_dim], written for the requests of `tiles` only.

    Returns:
        out.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride.
    """
    _check(q, k, v, indices, counts, tiles, out)
    if has_kernel(q):
        from vllm_sparsed.kernels.block_sparse_attention.launch import launch

        launch(q, k, v, indices, counts, tiles, scale, out)
        return out
    return block_sparse_attention_torch(q, k, v, indices, counts, tiles, scale=scale, out=out)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    out: Tensor,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        if x.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, head_dim], got {tuple(x.shape)}")
        if x.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
    if q.dtype not in FLOATS:
        raise ValueError(f"q must be bfloat16, float16 or float32, got {q.dtype}")
    tokens, num_heads, head_dim = q.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"q must have a head_dim out of {HEAD_DIMS}, got {head_dim}")
    if k.shape[0] != tokens or k.shape[2] != head_dim:
        raise ValueError(
            f"k must be [{tokens}, num_kv_heads, {head_dim}] to fit q, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    if out.shape != q.shape:
        raise ValueError(f"out must have the shape of q, {tuple(q.shape)}, got {tuple(out.shape)}")
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ValueError(f"q has {num_heads} heads, no multiple of the {k.shape[1]} of k")
    if indices.dim() != 3 or indices.shape[1] != num_heads:
        raise ValueError(
            f"indices must be [pattern_rows, {num_heads}, width], got {tuple(indices.shape)}"
        )
    if indices.dtype not in INDEX_DTYPES:
        raise ValueError(f"indices must be int16 or int32, got {indices.dtype}")
    if indices.stride(2) != 1:
        raise ValueError("indices must be contiguous in its last dimension")
    if counts.shape != indices.shape[:2]:
        raise ValueError(
            f"counts must be {tuple(indices.shape[:2])} to fit indices, got {tuple(counts.shape)}"
        )
    if counts.dtype != torch.int32:
        raise ValueError(f"counts must be int32, got {counts.dtype}")
    for name, x in (
        ("k", k),
        ("v", v),
        ("indices", indices),
        ("counts", counts),
        ("tiles", tiles.pattern_row),
        ("out", out),
    ):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {x.device}")


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_sizes: Sequence[int],
    *,
    index_dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Compile every kernel that requests of these shapes can need, so that no step waits for it.

    Runs each block size twice: on a request shorter than a block and on one of several blocks,
    which different kernels may serve. Does nothing on devices without Triton.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return
    for block_size in block_sizes:
        for length in (block_size // 2, 4 * block_size - block_size // 2):
            num_blocks = -(-length // block_size)
            # One fused tensor, as models hand it over: the strides decide about specialisation.
            qkv = torch.zeros(
                length, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype, device=device
            )
            q, k, v = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
            block_sparse_attention(
                q,
                k,
                v,
                torch.zeros(num_blocks, num_heads, 1, dtype=index_dtype, device=device),
                torch.ones(num_blocks, num_heads, dtype=torch.int32, device=device),
                QueryTiles.build([0], [length], [range(num_blocks)], block_size, device),
                scale=head_dim**-0.5,
                out=torch.empty(length, num_heads, head_dim, dtype=dtype, device=device),
            )
