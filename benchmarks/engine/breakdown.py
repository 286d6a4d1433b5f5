"""Where the time of a denoising step goes, by the names of its kernels (torch profiler)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

PARTS: Final = ("attention", "pattern", "linear", "activation", "rest", "sampler", "overhead")
"""Parts of a step, in the order of tables and plots.

Attention is dense and sparse attention alike; pattern its building; linear the projections, that of
the logits too; rest the embedding, norms and rotary embedding; sampler what follows the last layer,
less the product of the logits; overhead the wall clock less all of these: scheduler, packing,
output and gaps between kernels.
"""

_WORDS: Final = {
    "pattern": ("block_importance", "row_statistics", "select_blocks"),
    "attention": ("flash", "block_sparse", "fmha", "sdpa", "scaled_dot_product", "attention"),
    "activation": ("silu", "act_and_mul", "swiglu", "activation"),
    "rest": (
        "norm",
        "rotary",
        "rope",
        "embedding",
        "topk_softmax",
        "topk_gating",
        "moe_align",
        "moe_sum",
    ),
    "linear": (
        *("gemm", "nvjet", "cutlass", "wgmma", "cublas", "splitkreduce", "scaled_mm", "aten::mm"),
        *("aten::addmm", "aten::linear", "mkldnn", "onednn", "cpu_linear", "_quant", "fused_moe"),
    ),
}
"""Words of kernel names (of operator names on a CPU), looked for in this order."""

_LAYER_PARTS: Final = ("attention", "pattern", "activation")
"""Kernels that only the layers have; what comes after the last of them is the end of the step."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel (one operator on a CPU): its name, start and time in microseconds."""

    name: str
    start: float
    micros: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step's time.

    Attributes:
        milliseconds: by PARTS.
        longest: (milliseconds, calls, name) of the kernels that took most.
    """

    milliseconds: dict[str, float]
    longest: list[tuple[float, int, str]]


def part_of(name: str) -> str | None:
    """The part that a kernel's name tells, None where it tells none."""
    lowered = name.lower()
    for part, words in _WORDS.items():
        if any(word in lowered for word in words):
            return part
    return None


def breakdown(kernels: Sequence[Kernel], wall_ms: float) -> StepProfile:
    """Sort one step's kernels into parts.

    Args:
        kernels: of one step, in any order.
        wall_ms: the same step's time by the clock.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    parts = [part_of(kernel.name) for kernel in ordered]
    last = max((i for i, part in enumerate(parts) if part in _LAYER_PARTS), default=len(parts))
    sums = dict.fromkeys(PARTS, 0.0)
    by_name: dict[str, tuple[float, int]] = {}
    for index, (kernel, part) in enumerate(zip(ordered, parts, strict=True)):
        unnamed = "sampler" if index > last else "rest"
        sums[part or unnamed] += kernel.micros / 1e3
        total, calls = by_name.get(kernel.name, (0.0, 0))
        by_name[kernel.name] = (total + kernel.micros / 1e3, calls + 1)
    sums["overhead"] = max(0.0, wall_ms - sum(sums.values()))
    longest = sorted(((t, n, name) for name, (t, n) in by_name.items()), reverse=True)
    return StepProfile(sums, longest[:10])


class StepProfiler:
    """Profiles chosen steps of a request: pass `on_step` to `run_request`."""

    def __init__(self, steps: Sequence[int]) -> None:
        """Choose the steps, by index."""
        self._steps = frozenset(steps)
        self._traces: dict[int, Any] = {}
        self._warm: Any = None

    @contextlib.contextmanager
    def on_step(self, step: int) -> Iterator[None]:
        """Surrounds one step."""
        if step in self._steps:
            trace, self._warm = self._warm or _profiler(warm_up=0), None
            try:
                yield
            finally:
                trace.stop()
            self._traces[step] = trace
        elif step + 1 in self._steps:
            # A profiler's first kernels wait for its buffers: no gaps of the chosen step.
            self._warm = _profiler(warm_up=1)
            try:
                yield
            except BaseException:
                self._warm.step()  # PyTorch crashes where a profiler ends while it warms up.
                self._warm.stop()
                self._warm = None
                raise
            self._warm.step()
        else:
            yield

    def kernels(self, step: int) -> list[Kernel]:
        """What one of the chosen steps ran; empty where the step did not come."""
        if step not in self._traces:
            return []
        cuda = torch.cuda.is_available()
        device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
        found = []
        for event in self._traces[step].events():
            if event.device_type != device or getattr(event, "is_user_annotation", False):
                continue
            span = event.time_range
            micros = span.elapsed_us() if cuda else event.self_cpu_time_total
            found.append(Kernel(event.name, span.start, float(micros)))
        return found


def _profiler(warm_up: int) -> Any:
    """A running profiler that records one step after so many others."""
    activity = torch.profiler.ProfilerActivity
    kind = activity.CUDA if torch.cuda.is_available() else activity.CPU
    steps = torch.profiler.schedule(wait=0, warmup=warm_up, active=1, repeat=1)
    profiler = torch.profiler.profile(activities=[kind], schedule=steps)
    profiler.start()
    return profiler
