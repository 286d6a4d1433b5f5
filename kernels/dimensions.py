"""What the attention kernels are made for: head sizes, pattern blocks, dtypes and chips."""

from __future__ import annotations

import os
from functools import cache
from typing import Final

import torch

HEAD_DIMS: Final = (16, 32, 64, 80, 96, 128, 256)
BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Tokens of a pattern block."""

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES: Final = (torch.int16, torch.int32)
"""Of the index lists in the pattern store."""

CAPABILITIES: Final = ((8, 0), (8, 6), (8, 9), (9, 0))
"""Compute capabilities with configurations of their own."""

_MOST_MODEST: Final = (8, 6)


def known_capability(capability: tuple[int, int]) -> tuple[int, int]:
    """The entry of CAPABILITIES that serves a chip: its own or the next below of its generation.

    Chips of other generations take that of 8.6, whose 99 KiB of shared memory all of them have.
    """
    of_generation = [c for c in CAPABILITIES if c[0] == capability[0] and c <= capability]
    return max(of_generation, default=_MOST_MODEST)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; Triton's interpreter has the configurations of 8.0."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether Triton can reach a tensor: on CUDA, and anywhere in its interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
