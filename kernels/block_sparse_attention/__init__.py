"""Block-sparse attention forward over packed variable-length requests."""

from vllm_sparsed.kernels.block_sparse_attention.query_tiles import QueryTiles
from vllm_sparsed.kernels.block_sparse_attention.torch_path import block_sparse_attention_torch
from vllm_sparsed.kernels.block_sparse_attention.wrapper import block_sparse_attention, warm_up

__all__ = [
    "QueryTiles",
    "block_sparse_attention",
    "block_sparse_attention_torch",
    "warm_up",
]
