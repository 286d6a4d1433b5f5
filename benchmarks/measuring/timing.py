"""Times of repeated calls on a CUDA device or a CPU."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

MIN_CALLS: Final = 3
"""Calls that are timed even where one alone takes longer than the budget."""


LONG_CALL_MS: Final = 1000.0
"""A call that takes longer is timed once: nothing that varies is large beside it."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Milliseconds of one call: 20th percentile, median, 80th percentile."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> "Quantiles":
        """Of at least one value; between two values interpolated."""
        if len(milliseconds) == 1:
            return cls(milliseconds[0], milliseconds[0], milliseconds[0])
        fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(milliseconds), fifths[-1])


def time_calls(run: Callable[[], object], device: str, budget_ms: float) -> Quantiles:
    """Time a function that has been called before.

    On CUDA the L2 cache is cleared between calls (`triton.testing.do_bench`), unless one call
    takes a fifth of the budget: such a call overwrites that cache itself. A call of more than a
    second is timed once.

    Args:
        run: launches the work.
        device: "cuda" or "cpu".
        budget_ms: milliseconds to spend, more where three calls take longer.
    """
    if device == "cpu":
        return Quantiles.of(_time_on_cpu(run, budget_ms))
    estimate = _time_on_cuda(run)
    if estimate > LONG_CALL_MS:
        return Quantiles.of([estimate])
    if estimate > budget_ms / 5:
        calls = max(MIN_CALLS, int(budget_ms / estimate))
        return Quantiles.of([_time_on_cuda(run) for _ in range(calls)])
    import triton

    p20, p50, p80 = triton.testing.do_bench(
        run, warmup=max(1, int(budget_ms / 4)), rep=int(budget_ms), quantiles=[0.2, 0.5, 0.8]
    )
    return Quantiles(p20, p50, p80)


def synchronize(device: str) -> None:
    """Wait for the device, if it runs asynchronously."""
    if device == "cuda":
        torch.cuda.synchronize()


def _time_on_cpu(run: Callable[[], object], budget_ms: float) -> list[float]:
    times: list[float] = []
    while len(times) < MIN_CALLS or sum(times) < budget_ms:
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _time_on_cuda(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
