"""Block-sparse attention forward over packed variable-length requests."""

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import BLOCK_SIZES, QueryTiles
from vllm_sparsed.kernels.block_sparse_attention.reference import block_sparse_attention_reference
from vllm_sparsed.kernels.block_sparse_attention.torch_path import block_sparse_attention_torch
from vllm_sparsed.kernels.block_sparse_attention.wrapper import block_sparse_attention, warm_up

__all__ = [
    "BLOCK_SIZES",
    "QueryTiles",
    "block_sparse_attention",
    "block_sparse_attention_reference",
    "block_sparse_attention_torch",
    "warm_up",
]
