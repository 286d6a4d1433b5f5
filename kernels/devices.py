"""Dtypes of the kernels, and where Triton runs."""

from __future__ import annotations

import os
from functools import cache
from typing import Final

import torch

FLOATS_16_BIT: Final = (torch.bfloat16, torch.float16)
FLOATS: Final = (*FLOATS_16_BIT, torch.float32)
INDEX_DTYPES: Final = (torch.int16, torch.int32)
"""Of the index lists in the pattern store."""

FP8: Final = torch.float8_e4m3fn

_INTERPRETER: Final = (8, 0)


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; Triton's interpreter has the configurations of 8.0."""
    if device.type != "cuda":
        return _INTERPRETER
    return torch.cuda.get_device_capability(device)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether Triton can reach a tensor: on CUDA, and anywhere in its interpreter."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
