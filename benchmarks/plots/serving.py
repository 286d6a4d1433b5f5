"""Figures of the serving benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.rows import read_rows
from benchmarks.plots.goals import OVERHEAD_MS
from benchmarks.plots.style import COLOURS, MUTED, PART_COLOURS, pyplot, save

Row = dict[str, str]

SERIES: Final = {"sparse": (-0.19, "-o"), "dense": (0.19, "--s")}
"""Where the bars of a kind of attention stand, and its lines."""

OVERHEAD: Final = ("scheduler", "runner", "output")


def draw(source: Path, target: Path) -> list[Path]:
    """Draw the tables of serving; returns the files."""
    files = []
    loads = [row for row in read_rows(source / "serving.csv") if row["output_tokens_per_s"]]
    if loads:
        files += _loads(loads, target)
    overheads = read_rows(source / "overhead.csv")
    if overheads:
        files += _overhead(overheads, target)
    return files


def _loads(rows: list[Row], target: Path) -> list[Path]:
    """Throughput and latencies by number of clients, one row of panels for each kind of load."""
    keys = ("model", "input_len", "output_len", "range_ratio", "steps")
    kinds = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    plt = pyplot()
    size = (9.6, 0.4 + 3.1 * len(kinds))
    figure, axes = plt.subplots(len(kinds), 2, figsize=size, squeeze=False)
    for (left, right), kind in zip(axes, kinds, strict=True):
        of_kind = [row for row in rows if tuple(row[key] for key in keys) == kind]
        clients = sorted({int(row["clients"]) for row in of_kind})
        kinds_of_attention = {row["attention"] for row in of_kind}
        for attention, (shift, style) in SERIES.items():
            series = {
                clients.index(int(row["clients"])): row
                for row in of_kind
                if row["attention"] == attention
            }
            if series:
                alone = len(kinds_of_attention) == 1
                _throughput(left, series, attention, 0.0 if alone else shift)
                _latency(right, series, attention, style)
        model, prompt, canvas, spread, steps = kind
        left.set_title(
            f"{Path(model).name}: prompts of {prompt}, canvases of {canvas} tokens, "
            f"±{float(spread):.0%}, T = {steps}",
            fontsize=9,
            loc="left",
        )
        left.set_ylabel("output tokens per second")
        left.legend(fontsize=7, loc="upper left")
        left.set_ylim(top=left.get_ylim()[1] * 1.2)
        left.grid(axis="x", visible=False)
        right.set_ylabel("seconds, median to 99th percentile")
        right.set_ylim(bottom=0)
        right.legend(fontsize=7, loc="upper left")
        for axis in (left, right):
            axis.set_xticks(range(len(clients)), [str(n) for n in clients])
            axis.set_xlabel("clients")
    return save(figure, target, "serving_load", rows[0])


def _throughput(axis: Any, series: dict[int, Row], attention: str, shift: float) -> None:
    drawn = axis.bar(
        [place + shift for place in series],
        [float(row["output_tokens_per_s"]) for row in series.values()],
        0.36,
        color=COLOURS[f"ours, {attention}"],
        label=attention,
    )
    axis.bar_label(drawn, fmt="%.0f", fontsize=7)


def _latency(axis: Any, series: dict[int, Row], attention: str, style: str) -> None:
    places = sorted(series)
    for column, name, colour in (
        ("first_block_ms", "first block", COLOURS["ours"]),
        ("latency_ms", "whole request", COLOURS["paper"]),
    ):
        median = [float(series[place][f"{column}_p50"]) / 1e3 for place in places]
        above = [
            float(series[place][f"{column}_p99"]) / 1e3 - y
            for place, y in zip(places, median, strict=True)
        ]
        axis.errorbar(
            places,
            median,
            yerr=([0.0] * len(places), above),
            fmt=style,
            color=colour,
            markersize=4,
            capsize=3,
            label=f"{name}, {attention}",
        )


def _overhead(rows: list[Row], target: Path) -> list[Path]:
    """Overhead of a step by batch size."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.0, 3.8))
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for part in OVERHEAD:
        heights = [float(row[f"{part}_ms"]) for row in rows]
        colour = PART_COLOURS[part]
        axis.bar(places, heights, 0.6, bottom=bottom, color=colour, label=part)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for place, row in zip(places, rows, strict=True):
        if row["batch_size"] in OVERHEAD_MS:
            goal = OVERHEAD_MS[row["batch_size"]]
            axis.hlines(goal, place - 0.4, place + 0.4, color=MUTED, linestyle="--")
            axis.text(place, goal, "goal", ha="center", va="bottom", fontsize=7, color=MUTED)
    axis.set_xticks(places, [row["batch_size"] for row in rows])
    axis.set_xlabel("requests in the batch")
    axis.set_ylabel("milliseconds a step")
    axis.set_title("Engine overhead: a step less model and sampler")
    axis.legend(fontsize=7)
    return save(figure, target, "serving_overhead", rows[0])
