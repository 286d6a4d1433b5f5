"""Which candidates become tokens: of each group the most confident ones, as its rule says."""

from vllm_sparsed.kernels.confidence_ranking.configs import NOT_FINITE, UNDECIDED, Rule
from vllm_sparsed.kernels.confidence_ranking.wrapper import Groups, decide

__all__ = ["NOT_FINITE", "UNDECIDED", "Groups", "Rule", "decide"]
