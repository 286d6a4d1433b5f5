"""Which logit of a row is the smallest that top_p and top_k keep."""

from vllm_sparsed.kernels.logit_cutoff.wrapper import logit_cutoff

__all__ = ["logit_cutoff"]
