"""The algorithms by the name that `diffusion_alg` gives them, and what stands for no token."""

from vllm_sparsed.decoding.algorithms import ALGORITHMS
from vllm_sparsed.kernels.confidence_ranking.configs import NOT_FINITE, UNDECIDED

__all__ = ["ALGORITHMS", "NOT_FINITE", "UNDECIDED"]
