"""Range of the scaled values, and how the kernels run."""

from typing import Final

import torch

from vllm_sparsed.kernels.devices import FP8

LARGEST: Final = torch.finfo(FP8).max
LEAST_SCALE: Final = 1 / (LARGEST * 512)
"""As in vLLM's quantization of rows, so that rows of zeros have a scale too."""

MAX_WIDTH: Final = 32768
"""Columns of a result: one program holds a whole row."""

GATE_WARPS: Final = 16
NORM_WARPS: Final = 8
