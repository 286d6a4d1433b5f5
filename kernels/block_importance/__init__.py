"""Block importance maps of SparseD's pattern (arXiv 2509.24014), without any L x L tensor."""

from vllm_sparsed.kernels.block_importance.wrapper import block_importance, warm_up

__all__ = ["block_importance", "warm_up"]
