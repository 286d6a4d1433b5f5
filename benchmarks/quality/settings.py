"""The settings that are compared: dense, SparseD over a grid, baselines and ablations."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vllm_sparsed.config.parameter_table import (
    LONG_BLOCK_SIZE,
    LONG_SELECT,
    SHORT_BLOCK_SIZE,
    SHORT_SELECT,
)
from vllm_sparsed.planning.blocks import pattern_step

PATTERNS: Final = {
    "dense": "full attention in every step",
    "sparsed": "SparseD: blocks by importance, each query head for itself",
    "window": "a window of key blocks round the query block, as many as SparseD keeps",
    "sink_window": "the first key block and a window, together as many as SparseD keeps",
    "shared_heads": "SparseD on the mean importance over the layer's heads",
    "joint_selection": "as many blocks as SparseD, the best of all columns: no isolated selection",
}

SCHEDULES: Final = {
    "reuse": "built once, in the last dense step, and used in all later ones",
    "from_start": "built in the very first step and used from that one on: no dense step",
    "every_step": "built anew in every sparse step",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """How attention is computed; the parameters of a dense one are None.

    Attributes:
        select: share of the blocks that a row keeps.
        skip: share of the steps with full attention; None where no step has it.
        block_size: tokens of a block.
        pattern: a name of `PATTERNS`.
        schedule: a name of `SCHEDULES`.
    """

    select: float | None = None
    skip: float | None = None
    block_size: int | None = None
    pattern: str = "sparsed"
    schedule: str = "reuse"

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern={self.pattern!r} must be one of {', '.join(PATTERNS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        has_blocks = self.select is not None and self.block_size is not None
        has_skip = self.skip is not None
        if self.is_dense == has_blocks or has_skip == (
            self.is_dense or self.schedule == "from_start"
        ):
            raise ValueError(
                f"{self}: select and block_size belong to every setting but dense, "
                "skip to these where the schedule is not from_start"
            )

    @property
    def is_dense(self) -> bool:
        return self.pattern == "dense"

    @property
    def name(self) -> str:
        if self.is_dense:
            return "dense"
        parts = [f"select {self.select:g}", f"block {self.block_size}"]
        if self.skip is not None:
            parts.insert(1, f"skip {self.skip:g}")
        label = LABELS[self.pattern, self.schedule]
        return ", ".join([label, *parts] if label else parts)

    def extra_args(self) -> dict[str, Any]:
        """Parameters of a request."""
        if self.is_dense:
            return {"sparsed_enabled": False}
        return {
            "sparsed_dense_if_faster": False,
            "sparsed_select": self.select,
            "sparsed_skip": self.skip or 0.0,
            "sparsed_block_size": self.block_size,
        }

    def first_sparse_step(self, steps: int) -> int:
        """Of the `steps` asked for, the first with sparse attention; `steps` if there is none."""
        if self.is_dense:
            return steps
        if self.skip is None:
            return 0
        return min(steps, pattern_step(steps, self.skip) + 1)


LABELS: Final = {
    (pattern, schedule): " ".join(filter(None, (of_pattern, of_schedule)))
    for pattern, of_pattern in {
        "sparsed": "",
        "window": "window",
        "sink_window": "sink + window",
        "shared_heads": "heads share a pattern",
        "joint_selection": "no isolated selection",
    }.items()
    for schedule, of_schedule in {
        "reuse": "",
        "from_start": "from step 0",
        "every_step": "rebuilt in every step",
    }.items()
}
"""What a setting is called, by pattern and schedule; SparseD itself by its parameters alone."""

DENSE: Final = Setting(pattern="dense")

RELEASED: Final = (
    Setting(LONG_SELECT, 0.2, LONG_BLOCK_SIZE),
    Setting(SHORT_SELECT, 0.2, SHORT_BLOCK_SIZE),
)
"""SparseD's settings for long and for short contexts, the server's defaults by length."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Values that are tried; `defaults` are the points round which one value varies at a time."""

    defaults: tuple[Setting, ...]
    select: tuple[float, ...]
    skip: tuple[float, ...]
    block_size: tuple[int, ...]


def main_settings(axes: Axes) -> list[Setting]:
    """Dense and SparseD's defaults: what is asked at every length."""
    return [DENSE, *axes.defaults]


def sweep_settings(axes: Axes) -> list[Setting]:
    """One parameter at a time varied round each default."""
    found: list[Setting] = []
    for default in axes.defaults:
        found += [replace(default, select=value) for value in axes.select]
        found += [replace(default, skip=value) for value in axes.skip]
        found += [replace(default, block_size=value) for value in axes.block_size]
    return _without(found, main_settings(axes))


def product_settings(axes: Axes) -> list[Setting]:
    """Every combination of the values."""
    product = itertools.product(axes.select, axes.skip, axes.block_size)
    return _without((Setting(*values) for values in product), main_settings(axes))


def compared_settings(axes: Axes) -> list[Setting]:
    """Baselines and ablations of the paper, each at SparseD's density, round each default."""
    found: list[Setting] = []
    for default in axes.defaults:
        early = replace(default, skip=None, schedule="from_start")
        for pattern in ("window", "sink_window"):
            found += [replace(default, pattern=pattern), replace(early, pattern=pattern)]
        found += [
            early,
            replace(default, pattern="shared_heads"),
            replace(default, schedule="every_step"),
            replace(default, pattern="joint_selection"),
        ]
    return _without(found, [])


def sort_key(setting: Setting) -> tuple[float, ...]:
    """Order of a table: dense, SparseD by block, select and skip, baselines, ablations."""
    return (
        list(SCHEDULES).index(setting.schedule) + len(SCHEDULES) * _pattern_index(setting),
        setting.block_size or 0,
        setting.select or 0.0,
        -1.0 if setting.skip is None else setting.skip,
    )


def as_text(setting: Setting) -> dict[str, str]:
    """The fields for a CSV file; nothing stands for None."""
    return {name: "" if value is None else str(value) for name, value in asdict(setting).items()}


def from_text(row: dict[str, str]) -> Setting:
    """The setting of a CSV file's row."""
    return Setting(
        select=float(row["select"]) if row["select"] else None,
        skip=float(row["skip"]) if row["skip"] else None,
        block_size=int(row["block_size"]) if row["block_size"] else None,
        pattern=row["pattern"],
        schedule=row["schedule"],
    )


def _pattern_index(setting: Setting) -> int:
    return list(PATTERNS).index(setting.pattern)


def _without(settings: Iterable[Setting], known: Sequence[Setting]) -> list[Setting]:
    """Each once, in order, less those known."""
    return [setting for setting in dict.fromkeys(settings) if setting not in known]
