"""The gate of SwiGLU, silu(gate) * up, in one pass."""

from vllm_sparsed.kernels.silu_and_mul.wrapper import silu_and_mul

__all__ = ["silu_and_mul"]
