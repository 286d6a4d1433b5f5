"""Rotary position embedding of queries and keys in place, in one pass, with angles in float32."""

from vllm_sparsed.kernels.rotary_embedding.wrapper import rotary_embedding

__all__ = ["rotary_embedding"]
