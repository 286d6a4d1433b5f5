"""Counter-based random numbers: a value depends on its coordinates alone."""

from vllm_sparsed.kernels.counter_random.configs import signed, stream_key
from vllm_sparsed.kernels.counter_random.wrapper import uniform_rows

__all__ = ["signed", "stream_key", "uniform_rows"]
