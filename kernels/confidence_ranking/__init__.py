"""Which masked rows of each request become tokens: the most confident ones."""

from vllm_sparsed.kernels.confidence_ranking.wrapper import RankedRows, decide_rows

__all__ = ["RankedRows", "decide_rows"]
