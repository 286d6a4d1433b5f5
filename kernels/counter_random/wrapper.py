"""Checks and dispatch of the random numbers."""

import os

import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random.configs import BLOCK, stream_key
from vllm_sparsed.kernels.counter_random.torch_path import uniform_torch


def uniform_rows(
    seed: Tensor, step: Tensor, position: Tensor, stream: int, columns: int | None = None
) -> Tensor:
    """Uniform random numbers in (0, 1).

    One per row comes from a Triton kernel in one launch for CUDA tensors (and any tensor under
    Triton's interpreter), else from PyTorch: the same numbers on every device and in any batch.

    Args:
        seed, step, position: int64 [rows], contiguous: the coordinates of each number.
        stream: at least 0; numbers of different streams are independent.
        columns: numbers of a row; None: one, without a column dimension.

    Returns:
        float64 [rows] or [rows, columns]; multiples of 2^-53, of which 52 bits are random.

    Raises:
        ValueError: a coordinate has a wrong shape, dtype or stride.
    """
    for name, x in (("seed", seed), ("step", step), ("position", position)):
        if x.dtype != torch.int64 or x.shape != (seed.numel(),) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int64 [{seed.numel()}], got {x.dtype} {tuple(x.shape)}"
            )
    through_kernel = seed.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if columns is not None or not through_kernel:
        return uniform_torch(seed, step, position, stream, columns)
    from vllm_sparsed.kernels.counter_random.kernel import uniform_rows_kernel

    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    if seed.numel():
        uniform_rows_kernel[(-(-seed.numel() // BLOCK),)](
            seed, step, position, out, seed.numel(), STREAM_KEY=stream_key(stream), BLOCK=BLOCK
        )
    return out
