"""Fits the cost model of `vllm_sparsed.planning.crossover` to measured times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from vllm_sparsed.planning.crossover import AttentionCosts, KernelCost

LEAST_SHARE: Final = 1e-3
"""Least share of a time that each of the two parts gets, so that no rate is infinite."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Time of one kernel over one sequence and all heads.

    Attributes:
        kind: dense, sparse or build.
        block_size: of the pattern; 0 for dense.
        length: tokens.
        ms: milliseconds of a call.
        rows: tokens times heads.
        flops: of the products.
    """

    kind: str
    block_size: int
    length: int
    ms: float
    rows: float
    flops: float


def fit(measured: Sequence[Measured], lse_given: bool) -> AttentionCosts:
    """The costs of each kernel and block size that was measured."""
    by_kernel: dict[tuple[str, int], list[Measured]] = {}
    for time in measured:
        by_kernel.setdefault((time.kind, time.block_size), []).append(time)
    costs = {key: fit_kernel(times) for key, times in by_kernel.items()}
    return AttentionCosts(
        dense=costs["dense", 0],
        sparse={block: cost for (kind, block), cost in costs.items() if kind == "sparse"},
        build={block: cost for (kind, block), cost in costs.items() if kind == "build"},
        lse_given=lse_given,
    )


def fit_kernel(times: Sequence[Measured]) -> KernelCost:
    """Launch time, time per row and rate that explain the times best, by relative error.

    Each time in turn is taken for the longest that the launch decides; the device decides the rest.
    """
    fits = []
    for longest in times:
        launched = [time.ms for time in times if time.ms <= longest.ms]
        bound = [time for time in times if time.ms > longest.ms] or list(times)
        fits.append(_fit_device(bound, statistics.median(launched)))
    return min(fits, key=lambda cost: _error(cost, times))


def _fit_device(bound: Sequence[Measured], launch_ms: float) -> KernelCost:
    ms = np.array([time.ms for time in bound])
    parts = np.array([(time.rows, time.flops) for time in bound]) / ms[:, None]
    # Both parts together, and each alone: the best of those without a negative part.
    candidates = [np.linalg.lstsq(parts, np.ones(len(ms)), rcond=None)[0]]
    for kept in (0, 1):
        alone = np.zeros(2)
        column = parts[:, kept]
        alone[kept] = column.sum() / (column @ column)
        candidates.append(alone)
    allowed = [c for c in candidates if (c >= 0).all()]
    best = min(allowed, key=lambda c: float(np.square(parts @ c - 1).sum()))
    row_ms, flop_ms = np.maximum(best, LEAST_SHARE / parts.max(axis=0))
    return KernelCost(_rounded(launch_ms * 1e3), _rounded(row_ms * 1e6), _rounded(1e-9 / flop_ms))


def _error(cost: KernelCost, times: Sequence[Measured]) -> float:
    predicted = [cost.seconds(time.rows, time.flops) * 1e3 for time in times]
    return sum(math.log(p / time.ms) ** 2 for p, time in zip(predicted, times, strict=True))


def _rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def source(costs: AttentionCosts) -> str:
    """The entry of kernel_costs.py."""
    lines = ["AttentionCosts(", f"    dense={_source(costs.dense)},"]
    for name, by_block in (("sparse", costs.sparse), ("build", costs.build)):
        lines.append(f"    {name}={{")
        lines += [f"        {block}: {_source(cost)}," for block, cost in sorted(by_block.items())]
        lines.append("    },")
    if not costs.lse_given:
        lines.append("    lse_given=False,")
    return "\n".join([*lines, ")"])


def _source(cost: KernelCost) -> str:
    return f"KernelCost({cost.launch_us}, {cost.row_ns}, {cost.rate})"
