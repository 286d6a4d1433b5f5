"""Times of the three kinds of step, and what a whole request of more steps would take."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

KINDS: Final = ("dense", "building", "sparse")
"""Steps with full attention; the last of them, which also builds the patterns; the steps after."""


def steps_by_kind(total_steps: int, skip: float, sparse: bool) -> dict[str, int]:
    """How many steps of each kind a request has (SparseD, arXiv 2509.24014).

    Args:
        total_steps: T.
        skip: share of the steps with full attention.
        sparse: whether the request is sparse at all; if not, all steps are dense.
    """
    last_dense = int(total_steps * skip) + 1
    if not sparse or last_dense >= total_steps - 1:
        return {"dense": total_steps, "building": 0, "sparse": 0}
    return {"dense": last_dense, "building": 1, "sparse": total_steps - last_dense - 1}


def steps_to_measure(dense_steps: int, sparse_steps: int, skip: float, most: int) -> int:
    """The smallest T whose request has at least so many dense and sparse steps.

    Args:
        dense_steps: wanted before the one that builds.
        sparse_steps: wanted after it.
        skip: share of the steps with full attention.
        most: T may not be larger.

    Raises:
        ValueError: there is none.
    """
    for total in range(2, most + 1):
        counts = steps_by_kind(total, skip, sparse=True)
        if counts["dense"] >= dense_steps and counts["sparse"] >= sparse_steps:
            return total
    raise ValueError(
        f"no request of at most {most} steps has {dense_steps} dense and {sparse_steps} sparse "
        f"ones with skip {skip}: ask for fewer, or change skip or canvas"
    )


@dataclass
class StepTimes:
    """Measured seconds of each kind of step.

    Attributes:
        seconds: by kind.
        note: how a kind was measured, where that needs saying.
        density: share of the key blocks that the patterns keep; None: no patterns.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""
    density: float | None = None

    def add(self, kind: str, seconds: Sequence[float]) -> None:
        """Add measurements of a kind out of KINDS."""
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind}")
        self.seconds.setdefault(kind, []).extend(seconds)

    def median(self, kind: str) -> float:
        """Seconds of a step; raises KeyError where the kind was not measured."""
        return statistics.median(self.seconds[kind])

    def request_seconds(self, total_steps: int, skip: float, sparse: bool) -> float:
        """Seconds of a request: the medians times how often each kind comes.

        Raises:
            KeyError: a kind that the request has was not measured.
        """
        counts = steps_by_kind(total_steps, skip, sparse)
        return sum(count * self.median(kind) for kind, count in counts.items() if count)

    @property
    def measured(self) -> str:
        """How many steps of each kind were measured, in words."""
        return ", ".join(f"{len(self.seconds[k])} {k}" for k in KINDS if k in self.seconds)
