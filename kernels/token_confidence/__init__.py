"""Candidates of rows of logits and a statistic of their distribution, in one pass."""

from vllm_sparsed.kernels.token_confidence.configs import Statistic
from vllm_sparsed.kernels.token_confidence.wrapper import Draw, token_confidence

__all__ = ["Draw", "Statistic", "token_confidence"]
