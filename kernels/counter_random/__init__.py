"""Counter-based random numbers, one per row: a value depends on its coordinates alone."""

from vllm_sparsed.kernels.counter_random.wrapper import stream_key, uniform_rows

__all__ = ["stream_key", "uniform_rows"]
