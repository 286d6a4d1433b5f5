"""Checks and launch of the rotary embedding."""

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.devices import FLOATS, has_kernel
from vllm_sparsed.kernels.rotary_embedding.torch_path import rotate_torch

BLOCK_HEADS: Final = 16
"""Most heads of one program."""
NUM_WARPS: Final = 4


def rotary_embedding(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    """Rotate queries and keys in place (Su et al., arXiv 2104.09864, halves of a head pair up).

    CUDA tensors (and any tensor under Triton's interpreter) go to the Triton kernel, CPU tensors to
    PyTorch. Products and sums are float32, rounded once.

    Args:
        positions: int64 [tokens], each a row of cos_sin.
        query: [tokens, heads * head_dim], bfloat16, float16 or float32. Rows may be strided, here
            as in key: views of one projection.
        key: [tokens, key heads * head_dim], of the dtype of query.
        cos_sin: float32 [positions, head_dim], contiguous: cosines, then sines, of each position.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or stride.
    """
    _check(positions, query, key, cos_sin)
    num_tokens, head_dim = query.shape[0], cos_sin.shape[1]
    if num_tokens == 0:
        return
    if not has_kernel(query):
        for x in (query, key):
            rotate_torch(positions, x, cos_sin)
        return

    import triton

    from vllm_sparsed.kernels.rotary_embedding.kernel import rotary_embedding_kernel

    num_heads, num_kv_heads = query.shape[1] // head_dim, key.shape[1] // head_dim
    block_heads = min(BLOCK_HEADS, triton.next_power_of_2(num_heads))
    blocks = -(-num_heads // block_heads) + -(-num_kv_heads // block_heads)
    rotary_embedding_kernel[(num_tokens, blocks)](
        positions,
        query,
        key,
        cos_sin,
        query.stride(0),
        key.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        BLOCK_HEADS=block_heads,
        num_warps=NUM_WARPS,
    )


def _check(positions: Tensor, query: Tensor, key: Tensor, cos_sin: Tensor) -> None:
    if cos_sin.dim() != 2 or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(
            "cos_sin must be contiguous float32 [positions, head_dim], got "
            f"{cos_sin.dtype} {tuple(cos_sin.shape)}"
        )
    head_dim = cos_sin.shape[1]
    if head_dim % 2:
        raise ValueError(f"cos_sin must have an even head_dim, got {head_dim}")
    if positions.dim() != 1 or positions.dtype != torch.int64 or not positions.is_contiguous():
        raise ValueError(
            "positions must be contiguous int64 [tokens], got "
            f"{positions.dtype} {tuple(positions.shape)}"
        )
    if query.dtype not in FLOATS:
        raise ValueError(f"query must be bfloat16, float16 or float32, got {query.dtype}")
    for name, x in (("query", query), ("key", key)):
        if x.dim() != 2 or x.shape[0] != positions.shape[0] or not x.shape[1]:
            raise ValueError(
                f"{name} must be [{positions.shape[0]}, heads * head_dim] to fit positions, got "
                f"{tuple(x.shape)}"
            )
        if x.shape[1] % head_dim or x.stride(1) != 1:
            raise ValueError(
                f"{name} must have contiguous heads of {head_dim} elements, got rows of "
                f"{x.shape[1]} with stride {x.stride(1)}"
            )
        if x.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
    for name, x in (("key", key), ("positions", positions), ("cos_sin", cos_sin)):
        if x.device != query.device:
            raise ValueError(f"{name} must be on {query.device} like query, got {x.device}")
