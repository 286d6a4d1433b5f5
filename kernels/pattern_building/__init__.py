"""SparseD's pattern of one request and layer: importance maps, then selection into index lists."""

from vllm_sparsed.kernels.pattern_building.bounds import (
    generation_start_block,
    kept_blocks_bound,
    pattern_width,
)
from vllm_sparsed.kernels.pattern_building.driver import build_pattern, warm_up

__all__ = [
    "build_pattern",
    "generation_start_block",
    "kept_blocks_bound",
    "pattern_width",
    "warm_up",
]
