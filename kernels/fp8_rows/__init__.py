"""Norm and gate that write rows in fp8 with a scale each, for matrix products in fp8."""

from vllm_sparsed.kernels.fp8_rows.configs import MAX_WIDTH
from vllm_sparsed.kernels.fp8_rows.wrapper import rms_norm_fp8, silu_and_mul_fp8

__all__ = ["MAX_WIDTH", "rms_norm_fp8", "silu_and_mul_fp8"]
