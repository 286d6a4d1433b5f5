"""The settings that are compared: dense, SparseD over a grid, baselines and ablations."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from vllm_sparsed.config.parameter_table import (
    BLOCK_LENGTH,
    LONG_BLOCK_SIZE,
    LONG_SELECT,
    PACES,
    PARAMETERS,
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


FIXED: Final = "fixed"
"""The pace that decides the same number of tokens in every pass of a block."""

REUSE: Final = ("none", "prefix", "dual", "window")
"""Which keys and values are kept between passes: values of `diffusion_kv_reuse`."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How attention is computed, how many tokens a pass decides, and what is kept between passes.

    The parameters of attention of a dense one are None.

    Attributes:
        select: share of the blocks that a row keeps.
        skip: share of the steps with full attention; None where no step has it.
        block_size: tokens of a block.
        pattern: a name of `PATTERNS`.
        schedule: a name of `SCHEDULES`.
        pace: `FIXED` or a name of `PACES`.
        pace_value: tokens a pass, 0 for the whole answer in one; else the pace's own parameter.
        kv_reuse: a name of `REUSE`.
        refresh: tokens decided between two passes over all rows; None: as the server does.
        margin: rows beside the block that other passes compute; None: as the server does.
    """

    select: float | None = None
    skip: float | None = None
    block_size: int | None = None
    pattern: str = "sparsed"
    schedule: str = "reuse"
    pace: str = FIXED
    pace_value: float = 1
    kv_reuse: str = "none"
    refresh: int | None = None
    margin: int | None = None

    def __post_init__(self) -> None:
        if self.pace != FIXED and self.pace not in PACES:
            raise ValueError(f"pace={self.pace!r} must be one of {', '.join((FIXED, *PACES))}")
        if self.kv_reuse not in REUSE:
            raise ValueError(f"kv_reuse={self.kv_reuse!r} must be one of {', '.join(REUSE)}")
        if self.kv_reuse != "window" and (self.refresh, self.margin) != (None, None):
            raise ValueError(f"{self}: refresh and margin belong to kv_reuse='window'")
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
    def has_shortcuts(self) -> bool:
        """Whether a pass decides other than one token, or keys and values are kept."""
        return (self.pace, self.pace_value, self.kv_reuse) != (FIXED, 1, "none")

    @property
    def name(self) -> str:
        return ", ".join([self.attention_name, *self._shortcut_names(True)])

    @property
    def method(self) -> str:
        """The name without the values that a curve varies: pace, refresh and margin."""
        return ", ".join([self.attention_name, *self._shortcut_names(False)])

    def _shortcut_names(self, values: bool) -> list[str]:
        parts = []
        if self.pace != FIXED:
            parts.append(f"{self.pace} {self.pace_value:g}" if values else self.pace)
        elif not values:
            parts.append("fixed schedule")
        elif self.pace_value != 1:
            parts.append(f"{self.pace_value:g} a pass" if self.pace_value else "all in one pass")
        if self.kv_reuse != "none":
            parts.append(f"{self.kv_reuse} kept")
            if values and self.refresh is not None:
                parts.append(f"refresh {self.refresh}")
            if values and self.margin is not None:
                parts.append(f"margin {self.margin}")
        return parts

    @property
    def attention_name(self) -> str:
        if self.is_dense:
            return "dense"
        parts = [f"select {self.select:g}", f"block {self.block_size}"]
        if self.skip is not None:
            parts.insert(1, f"skip {self.skip:g}")
        label = LABELS[self.pattern, self.schedule]
        return ", ".join([label, *parts] if label else parts)

    def extra_args(self, canvas: int) -> dict[str, Any]:
        """Parameters of a request with a canvas of so many tokens."""
        return {**self._attention_args(), **self._pace_args(canvas), **self._reuse_args()}

    def _pace_args(self, canvas: int) -> dict[str, Any]:
        if self.pace != FIXED:
            return {
                "diffusion_block_length": BLOCK_LENGTH,
                f"diffusion_{self.pace}": self.pace_value,
            }
        if not self.pace_value:
            return {"diffusion_block_length": canvas, "diffusion_steps": 1}
        steps = math.ceil(canvas / self.pace_value)
        return {"diffusion_block_length": BLOCK_LENGTH, "diffusion_steps": steps}

    def _reuse_args(self) -> dict[str, Any]:
        if self.kv_reuse == "none":
            return {}
        args: dict[str, Any] = {"diffusion_kv_reuse": self.kv_reuse}
        if self.refresh is not None:
            args["diffusion_refresh_tokens"] = self.refresh
        if self.margin is not None:
            args["diffusion_window_margin"] = self.margin
        return args

    def _attention_args(self) -> dict[str, Any]:
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


PACE_VALUES: Final = {
    FIXED: (2, 4, 8, 0),
    "threshold": (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    "factor": (0.25, 0.5, 1.0, 2.0),
    "entropy_bound": (0.01, 0.05, 0.1, 0.3),
    "entropy_threshold": (0.05, 0.1, 0.3),
}
"""Of each pace over its range."""

REFRESH: Final = (8, 16, 32, 64, 128, 256)
MARGIN: Final = (0, 16, 32, 64)


def shortcut_settings(axes: Axes, kept: bool) -> list[Setting]:
    """Several tokens a pass, kept keys and values, each alone, together, and with SparseD.

    Args:
        kept: whether the server can keep keys and values (`keeps_keys_and_values`).
    """
    paces = [replace(DENSE, pace=p, pace_value=v) for p, vs in PACE_VALUES.items() for v in vs]
    reuse: list[Setting] = []
    if kept:
        reuse += [replace(DENSE, kv_reuse=mode) for mode in ("prefix", "dual")]
        window = replace(DENSE, kv_reuse="window", refresh=BLOCK_LENGTH, margin=16)
        reuse += [replace(window, refresh=value) for value in REFRESH]
        reuse += [replace(window, margin=value) for value in MARGIN]
    attentions = [DENSE, *axes.defaults]
    together = [
        replace(attention, pace="threshold", pace_value=value, kv_reuse=mode)
        for attention in attentions
        for value in (0.7, 0.9)
        for mode in ("none", *(("prefix", "dual", "window") if kept else ()))
    ]
    fixed = [replace(attention, pace_value=4) for attention in attentions]
    alone = [replace(a, kv_reuse=m) for a in axes.defaults for m in REUSE[1:]] if kept else []
    return _without([*paces, *reuse, *together, *fixed, *alone], main_settings(axes))


def keeps_keys_and_values() -> bool:
    """Whether this version of the package has `diffusion_kv_reuse`."""
    return any(parameter.name == "kv_reuse" for parameter in PARAMETERS)


def sort_key(setting: Setting) -> tuple[float, ...]:
    """Order of a table: dense, SparseD by block, select and skip, baselines, ablations."""
    return (
        list(REUSE).index(setting.kv_reuse),
        (FIXED, *PACES).index(setting.pace),
        setting.pace_value,
        list(SCHEDULES).index(setting.schedule) + len(SCHEDULES) * _pattern_index(setting),
        setting.block_size or 0,
        setting.select or 0.0,
        -1.0 if setting.skip is None else setting.skip,
        setting.refresh or 0,
        -1 if setting.margin is None else setting.margin,
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
        pace=row["pace"],
        pace_value=float(row["pace_value"]),
        kv_reuse=row["kv_reuse"],
        refresh=int(row["refresh"]) if row["refresh"] else None,
        margin=int(row["margin"]) if row["margin"] else None,
    )


def _pattern_index(setting: Setting) -> int:
    return list(PATTERNS).index(setting.pattern)


def _without(settings: Iterable[Setting], known: Sequence[Setting]) -> list[Setting]:
    """Each once, in order, less those known."""
    return [setting for setting in dict.fromkeys(settings) if setting not in known]
