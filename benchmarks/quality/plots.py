"""Plots of an evaluation, each as PNG and SVG."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.results import ALL_TASKS, Row, main_settings, pooled_rows
from benchmarks.quality.settings import DENSE, PATTERNS, Setting
from benchmarks.quality.similarity import Overlap
from small_model.tasks import TASKS

Rows = Sequence[Row]


def draw_all(
    folder: Path, rows: Rows, same_documents: Rows, overlaps: Sequence[Overlap]
) -> list[str]:
    """Draw what there is.

    Args:
        folder: where PNG and SVG files go.
        rows: of all answers.
        same_documents: of the answers about documents that all settings were asked about, for what
            compares settings.
        overlaps: of patterns.

    Returns:
        Names of the plots, none where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    main = main_settings(rows)
    defaults = [setting for setting in main if not setting.is_dense]
    figures: dict[str, Callable[[], Any]] = {
        "by-length": lambda: by_length(rows, main),
        "parameters": lambda: by_parameter(same_documents, defaults),
        "baselines": lambda: by_task(same_documents, defaults, _is_baseline),
        "ablations": lambda: by_task(same_documents, defaults, _is_ablation),
        "similarity": lambda: similarity(overlaps),
        "tokens-per-pass": lambda: by_cost(same_documents, "tokens_per_pass"),
        "rows-per-token": lambda: by_cost(same_documents, "rows_per_token"),
    }
    drawn = []
    for name, draw in figures.items():
        figure = draw()
        if figure is None:
            continue
        figure.tight_layout()
        for suffix in ("png", "svg"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150, bbox_inches="tight")
        drawn.append(name)
    return drawn


def by_length(rows: Rows, settings: Sequence[Setting]) -> Any:
    """Exact match over length of dense attention and the defaults, a panel per task."""
    tasks = [task for task in TASKS if any(row.task == task for row in rows)]
    figure, axes = _panels(len(tasks), 3.0)
    for axis, task in zip(axes, tasks, strict=True):
        for number, setting in enumerate(settings):
            shown = [row for row in rows if row.task == task and row.setting == setting]
            # A little apart, so that bars do not hide each other.
            places = [row.length * 1.04**number for row in shown]
            _errorbar(axis, places, shown, setting.name)
        axis.set(title=task, xlabel="tokens", xscale="log", ylim=(-0.02, 1.02))
        lengths = sorted({row.length for row in rows if row.task == task})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
    axes[0].set_ylabel("exact match")
    _legend(figure, axes[0])
    return figure


def by_parameter(rows: Rows, defaults: Sequence[Setting]) -> Any:
    """Exact match over select, skip and block size, a line per default."""
    found = {row.setting: row for row in pooled_rows(rows)}
    defaults = [setting for setting in defaults if setting in found]
    names = ("select", "skip", "block_size")
    # Defaults that differ in the varied parameter alone have the same line: drawn once.
    lines = [
        (name, default, _varied(found, default, name))
        for name in names
        for number, default in enumerate(defaults)
        if not any(_same_but(default, other, name) for other in defaults[:number])
    ]
    if not any(len(line) > 1 for _, _, line in lines):
        return None
    figure, axes = _panels(len(names), 3.6)
    for axis, name in zip(axes, names, strict=True):
        for of, default, line in lines:
            if of == name:
                _errorbar(axis, [getattr(r.setting, name) for r in line], line, default.name)
        for setting, row in found.items():
            if setting == DENSE:
                axis.axhspan(row.low, row.high, color="grey", alpha=0.2, label="dense")
        axis.set(xlabel=name.replace("_", " "))
    axes[-1].set_xscale("log", base=2)
    blocks = sorted({r.setting.block_size or 0 for _, _, line in lines for r in line})
    axes[-1].set_xticks(blocks, [str(block) for block in blocks])
    axes[0].set_ylabel("exact match, all tasks")
    _legend(figure, axes[0])
    return figure


def by_task(rows: Rows, defaults: Sequence[Setting], chosen: Callable[[Setting], bool]) -> Any:
    """Exact match of dense attention, SparseD and chosen settings, a panel per default."""
    length = pooled_rows(rows)[0].length
    here = [row for row in rows if row.length == length]
    others = [s for s in dict.fromkeys(row.setting for row in here) if chosen(s)]
    if not others or not defaults:
        return None
    tasks = [t for t in (*TASKS, ALL_TASKS) if any(row.task == t for row in here)]
    figure, axes = _panels(len(defaults), max(4.0, 1.2 * len(tasks)), columns=1)
    for axis, default in zip(axes, defaults, strict=True):
        shown = [row.setting for row in here if row.setting in (DENSE, default)]
        shown += [s for s in others if _beside(s, default)]
        settings = list(dict.fromkeys(shown))
        width = 0.8 / len(settings)
        for number, setting in enumerate(settings):
            bars = {row.task: row for row in here if row.setting == setting}
            places = [i + (number + 0.5) * width - 0.4 for i, t in enumerate(tasks) if t in bars]
            values = [bars[t] for t in tasks if t in bars]
            heights = [row.exact_match for row in values]
            label = setting.name.split(", select")[0]
            axis.bar(places, heights, width, label=label)
            axis.errorbar(places, heights, _errors(values), fmt="none", ecolor="black", lw=0.6)
        axis.set_xticks(range(len(tasks)), [t.replace("_", "\n") for t in tasks], fontsize=8)
        axis.set(title=f"{default.name}; {length} tokens", ylabel="exact match", ylim=(0, 1.02))
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def by_cost(rows: Rows, cost: str) -> Any:
    """Exact match over what an answer costs, a panel per task and a line per method.

    Args:
        rows: of several lengths; that of most settings is drawn.
        cost: field of a row, `tokens_per_pass` or `rows_per_token`.
    """
    if not any(row.setting.has_shortcuts for row in rows):
        return None
    length = pooled_rows(rows)[0].length
    here = [row for row in rows if row.length == length and row.tokens]
    tasks = [t for t in (*TASKS, ALL_TASKS) if any(row.task == t for row in here)]
    columns = min(4, len(tasks))
    figure, axes = _panels(len(tasks), 3.6, columns)
    methods = list(dict.fromkeys(row.setting.method for row in here))
    colors = [f"C{n % 10}" for n in range(len(methods))]
    for axis, task in zip(axes, tasks, strict=False):
        for number, (method, color) in enumerate(zip(methods, colors, strict=True)):
            line = [r for r in here if r.task == task and r.setting.method == method]
            line.sort(key=lambda row: float(getattr(row, cost)))
            places = [getattr(row, cost) for row in line]
            heights = [row.exact_match for row in line]
            style = ("-", "--", ":", "-.")[number // 10 % 4]
            axis.errorbar(
                places,
                heights,
                yerr=_errors(line),
                label=method,
                color=color,
                ls=style,
                marker="o",
                ms=3,
                lw=1,
                elinewidth=0.5,
            )
        axis.set(title=task, xlabel=cost.replace("_", " "), xscale="log", ylim=(-0.02, 1.02))
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    axes[0].set_ylabel(f"exact match, {length} tokens")
    _legend(figure, axes[0])
    return figure


def similarity(overlaps: Sequence[Overlap]) -> Any:
    """Overlap of patterns between steps and between heads, a row per block size."""
    if not overlaps:
        return None
    blocks = list(dict.fromkeys(o.block_size for o in overlaps))
    layers = sorted({o.layer for o in overlaps})
    figure, axes = _panels(3 * len(blocks), 3.8, columns=3)
    for row, block in enumerate(blocks):
        mine = [o for o in overlaps if o.block_size == block]
        steps = {layer: _matrix(mine, "steps", layer) for layer in layers}
        heads = [_matrix(mine, "heads", layer) for layer in layers]
        mean, line, beside = axes[3 * row : 3 * row + 3]
        image = mean.imshow(sum(steps.values()) / len(layers), vmin=0, vmax=1, origin="lower")
        mean.set(title=f"steps, block {block}, mean of layers", xlabel="step", ylabel="step")
        figure.colorbar(image, ax=mean, shrink=0.8, label="overlap")
        for layer, matrix in steps.items():
            line.plot(matrix[:, -1], label=f"layer {layer}")
        density = float(np.mean([o.density for o in mine]))
        line.axhline(density, color="grey", ls=":", label="chance")
        line.set(title="with the last step's pattern", xlabel="step", ylim=(0, 1.02))
        if len(layers) <= 8:
            line.legend(fontsize=6)
        # Heads of a layer in one square each, side by side.
        image = beside.imshow(np.concatenate(heads, axis=1), vmin=0, vmax=1, aspect="equal")
        size = len(heads[0])
        beside.set_xticks(
            [i * size + (size - 1) / 2 for i in range(len(layers))], map(str, layers), fontsize=6
        )
        for i in range(1, len(layers)):
            beside.axvline(i * size - 0.5, color="white", lw=1)
        beside.set(title="two heads of a layer", xlabel="layer", ylabel="head")
        figure.colorbar(image, ax=beside, shrink=0.5, label="overlap")
    return figure


def _is_baseline(setting: Setting) -> bool:
    return setting.pattern in ("window", "sink_window")


def _is_ablation(setting: Setting) -> bool:
    return not _is_baseline(setting) and (
        setting.schedule != "reuse" or setting.pattern not in list(PATTERNS)[:2]
    )


def _beside(setting: Setting, default: Setting) -> bool:
    """Whether the setting's other parameters are those of the default."""
    same = (setting.select, setting.block_size) == (default.select, default.block_size)
    return same and setting.skip in (None, default.skip)


def _varied(found: dict[Setting, Row], default: Setting, name: str) -> list[Row]:
    """Rows that differ from the default in one parameter at most, ascending in it."""
    line = [row for setting, row in found.items() if _same_but(setting, default, name)]
    return sorted(line, key=lambda row: float(getattr(row.setting, name)))


def _same_but(one: Setting, other: Setting, name: str) -> bool:
    names = [f.name for f in fields(one) if f.name != name]
    return all(getattr(one, n) == getattr(other, n) for n in names)


def _matrix(overlaps: Sequence[Overlap], kind: str, layer: int) -> Any:
    """float [n, n] of one layer."""
    mine = [o for o in overlaps if o.kind == kind and o.layer == layer]
    size = 1 + max(o.first for o in mine)
    matrix = np.zeros((size, size))
    for o in mine:
        matrix[o.first, o.second] = o.overlap
    return matrix


def _panels(number: int, width: float, columns: int = 0) -> tuple[Any, list[Any]]:
    from matplotlib import pyplot

    across = columns or number
    down = -(-number // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(width * across, 3.3 * down), squeeze=False
    )
    return figure, list(axes.flat)


def _errors(rows: Rows) -> list[list[float]]:
    return [
        [max(0.0, row.exact_match - row.low) for row in rows],
        [max(0.0, row.high - row.exact_match) for row in rows],
    ]


def _errorbar(axis: Any, places: Sequence[float], rows: Rows, label: str) -> None:
    values = [row.exact_match for row in rows]
    axis.errorbar(places, values, yerr=_errors(rows), label=label, marker="o", ms=3, capsize=2)


def _legend(figure: Any, axis: Any) -> None:
    """One for all panels, below them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=7
    )
