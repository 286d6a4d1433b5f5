"""Selection of the most important key blocks per query block into index lists."""

from vllm_sparsed.kernels.block_selection.bounds import kept_columns
from vllm_sparsed.kernels.block_selection.configs import MAX_BLOCKS
from vllm_sparsed.kernels.block_selection.wrapper import select_blocks, warm_up

__all__ = ["MAX_BLOCKS", "kept_columns", "select_blocks", "warm_up"]
