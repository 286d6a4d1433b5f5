"""Checks and dispatch of the block importance."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.block_importance.configs import TileConfig, tile_config
from vllm_sparsed.kernels.block_importance.torch_path import block_importance_torch
from vllm_sparsed.kernels.devices import FLOATS, capability_of, has_kernel
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES, HEAD_DIMS

LOG2_E: Final = 1.4426950408889634


def block_importance(
    q: Tensor,
    k: Tensor,
    *,
    first_generation_block: int,
    block_size: int,
    scale: float,
    lse: Tensor | None = None,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean attention probability of every (query block, key block) of ONE request, one layer.

    The two maps from which SparseD (arXiv 2509.24014, section 4) selects: the first from the
    softmax over all L keys, the second from the softmax over the keys from
    `first_generation_block * block_size` on. What is missing in the last block counts as zeros.

    Args:
        q: [L, num_heads, D] after rotary embedding; any strides, last dimension contiguous.
        k: [L, num_kv_heads, D], likewise; bfloat16, float16 or float32 as q.
        first_generation_block: in [0, n), n = ceil(L / block_size).
        block_size: 16, 32, 64 or 128.
        scale: factor of the scores, usually D ** -0.5.
        lse: float32 [num_heads, L], natural log of the sum of exp(scaled scores) over all keys, as
            FlashAttention returns it. None: computed here. The CPU path does not need it.
        config: tile configuration instead of the table's.

    Returns:
        float32 [num_heads, n, n] and float32 [num_heads, n, n - first_generation_block]; the same
        tensor twice where first_generation_block is 0.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    _check(q, k, first_generation_block, block_size, lse)
    if not has_kernel(q):
        return block_importance_torch(
            q, k, first_generation_block=first_generation_block, block_size=block_size, scale=scale
        )
    if config is None:
        config = tile_config(q.shape[2], q.dtype, block_size, capability_of(q.device))
    return _launch(q, k, first_generation_block, block_size, scale, lse, config)


def _launch(
    q: Tensor,
    k: Tensor,
    first_generation_block: int,
    block_size: int,
    scale: float,
    lse: Tensor | None,
    config: TileConfig,
) -> tuple[Tensor, Tensor]:
    from vllm_sparsed.kernels.block_importance.kernel import (
        block_importance_kernel,
        row_statistics_kernel,
    )

    seq_len, num_heads, head_dim = q.shape
    num_blocks = -(-seq_len // block_size)
    group = num_heads // k.shape[1]
    tiles = (-(-seq_len // config.block_m), num_heads)
    tma = config.tma and _fits_tma(q) and _fits_tma(k)
    q_source, k_source = (
        (_descriptor(q, config.block_m), _descriptor(k, config.block_n)) if tma else (q, k)
    )
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1))
    options: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_MAIN": _main_head_dim(head_dim),
        "CHUNK": config.chunk,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "TMA": tma,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    if config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg

    # The score's factor in float32, and what turns a log-sum-exp into the same rounded units.
    scale_log2 = float(torch.tensor(scale * LOG2_E, dtype=torch.float32))
    lse_factor = float(torch.tensor(scale_log2 / scale, dtype=torch.float32))
    # With no prefill part both softmaxes are the same one.
    same = first_generation_block == 0
    statistics = [lse, lse]
    if lse is None or not same:
        shape = (2, num_heads, seq_len)
        generation_rows = torch.empty(shape, dtype=torch.float32, device=q.device)
        full_rows = lse
        if lse is None:
            full_rows = generation_rows if same else torch.empty_like(generation_rows)
        row_statistics_kernel[tiles](
            q_source,
            k_source,
            full_rows,
            generation_rows,
            seq_len,
            first_generation_block * block_size,
            group,
            *strides,
            scale_log2,
            FULL=lse is None and not same,
            **options,
        )
        statistics = [full_rows, generation_rows]
    importance = torch.empty(
        (num_heads, num_blocks, num_blocks), dtype=torch.float32, device=q.device
    )
    generation = importance
    if not same:
        width = num_blocks - first_generation_block
        generation = torch.empty(
            (num_heads, num_blocks, width), dtype=torch.float32, device=q.device
        )
    block_importance_kernel[tiles](
        q_source,
        k_source,
        *statistics,
        importance,
        generation,
        seq_len,
        num_blocks,
        num_blocks if same else first_generation_block,
        group,
        *strides,
        0 if lse is None else lse.stride(0),
        scale_log2,
        lse_factor,
        scale_log2 / scale - lse_factor,
        BLOCK_SIZE=block_size,
        LSE_GIVEN=lse is not None,
        **options,
    )
    return importance, generation


def warm_up(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_sizes: Sequence[int],
    device: torch.device | str,
) -> None:
    """Compile every variant for one model: with or without `lse`, with or without prefill part."""
    group = num_heads // num_kv_heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    for block_size in block_sizes:
        seq_len = 2 * block_size
        for fused in (True, False):
            # Views of a fused projection and separate tensors differ in what their strides promise.
            qkv = torch.zeros((seq_len, width), dtype=dtype, device=device)
            q, k, _ = qkv.split([num_heads * head_dim] + [num_kv_heads * head_dim] * 2, dim=1)
            q = q.view(seq_len, num_heads, head_dim)[:, :group]
            k = k.view(seq_len, num_kv_heads, head_dim)[:, :1]
            if not fused:
                q, k = q.contiguous(), k.contiguous()
            lse = torch.zeros((group, seq_len), dtype=torch.float32, device=device)
            for given in (lse, None):
                for first_generation_block in (0, 1):
                    block_importance(
                        q,
                        k,
                        first_generation_block=first_generation_block,
                        block_size=block_size,
                        scale=head_dim**-0.5,
                        lse=given,
                    )


def _check(
    q: Tensor, k: Tensor, first_generation_block: int, block_size: int, lse: Tensor | None
) -> None:
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"q and k must be [L, heads, head_dim], got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if q.shape[0] == 0:
        raise ValueError("q must have at least one row")
    if q.dtype != k.dtype or q.dtype not in FLOATS:
        raise ValueError(f"q and k must share a dtype of {FLOATS}, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        raise ValueError(f"q and k must be on one device, got {q.device} and {k.device}")
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"num_heads {q.shape[1]} must be a multiple of num_kv_heads {k.shape[1]}")
    if q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError("q and k must be contiguous in their last dimension")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
    num_blocks = -(-q.shape[0] // block_size)
    if not 0 <= first_generation_block < num_blocks:
        raise ValueError(
            f"first_generation_block must be in [0, {num_blocks}), got {first_generation_block}"
        )
    if lse is not None and (
        lse.shape != (q.shape[1], q.shape[0])
        or lse.dtype != torch.float32
        or lse.stride(1) != 1
        or lse.device != q.device
    ):
        raise ValueError(
            f"lse must be float32 [num_heads, L] = {(q.shape[1], q.shape[0])} on {q.device} with "
            f"contiguous rows, got {lse.dtype} {tuple(lse.shape)} on {lse.device}"
        )


def _main_head_dim(head_dim: int) -> int:
    """The largest power of two in head_dim; the kernels take the rest, 16 or 32, apart."""
    return 1 << (head_dim.bit_length() - 1)


def _fits_tma(x: Tensor) -> bool:
    """Whether x [L, heads, D] is one matrix [L, heads * D] that a descriptor can address."""
    head_dim = x.shape[2]
    return (
        head_dim & (head_dim - 1) == 0
        and (x.shape[1] == 1 or x.stride(1) == head_dim)
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
    )


def _descriptor(x: Tensor, rows: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    seq_len, num_heads, head_dim = x.shape
    return TensorDescriptor(x, [seq_len, num_heads * head_dim], [x.stride(0), 1], [rows, head_dim])
