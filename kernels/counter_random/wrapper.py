"""Checks and launch of the random numbers."""

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random.reference import INCREMENT

BLOCK: Final = 128


def stream_key(stream: int) -> int:
    """What a stream adds to every seed, as a signed 64-bit number."""
    key = (stream + 1) * INCREMENT % (1 << 64)
    return key - (1 << 64) if key >= 1 << 63 else key


def uniform_rows(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform random numbers in (0, 1), one per row, in one launch.

    A Triton kernel, for CUDA tensors (and any tensor under Triton's interpreter). The same numbers
    on every device and in any batch.

    Args:
        seed, step, position: int64 [rows], contiguous: the coordinates of each number.
        stream: at least 0; numbers of different streams are independent.

    Returns:
        float64 [rows]; multiples of 2^-53, of which 52 bits are random.

    Raises:
        ValueError: a coordinate has a wrong shape, dtype or stride.
    """
    for name, x in (("seed", seed), ("step", step), ("position", position)):
        if x.dtype != torch.int64 or x.shape != (seed.numel(),) or not x.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous int64 [{seed.numel()}], got {x.dtype} {tuple(x.shape)}"
            )
    from vllm_sparsed.kernels.counter_random.kernel import uniform_rows_kernel

    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    if seed.numel():
        uniform_rows_kernel[(-(-seed.numel() // BLOCK),)](
            seed, step, position, out, seed.numel(), STREAM_KEY=stream_key(stream), BLOCK=BLOCK
        )
    return out
