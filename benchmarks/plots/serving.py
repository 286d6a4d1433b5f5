"""Figures of the serving benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from benchmarks.measuring.rows import read_rows
from benchmarks.plots.style import COLOURS, MUTED, PART_COLOURS, pyplot, save

Row = dict[str, str]

GOALS: Final = {"1": 2.0, "64": 5.0}
"""Milliseconds of overhead a step that are aimed at, by batch size."""

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
    """Throughput and latencies by number of clients."""
    rows = sorted(rows, key=lambda row: int(row["clients"]))
    places = range(len(rows))
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8))
    drawn = left.bar(
        places, [float(row["output_tokens_per_s"]) for row in rows], 0.6, color=COLOURS["ours"]
    )
    left.bar_label(drawn, fmt="%.0f", fontsize=7)
    left.set_ylabel("output tokens per second")
    for column, name, colour in (
        ("first_block_ms", "first block", COLOURS["ours"]),
        ("latency_ms", "whole request", COLOURS["paper"]),
    ):
        for percentile, style in (("50", "-o"), ("99", ":s")):
            y = [float(row[f"{column}_p{percentile}"]) / 1e3 for row in rows]
            label = f"{name}, {'median' if percentile == '50' else '99th percentile'}"
            right.plot(places, y, style, markersize=4, color=colour, label=label)
    right.set_ylim(bottom=0)
    right.set_ylabel("seconds")
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.set_xticks(places, [row["clients"] for row in rows])
        axis.set_xlabel("clients")
    first = rows[0]
    figure.suptitle(
        f"{Path(first['model']).name}: prompts of {first['input_len']}, canvases of "
        f"{first['output_len']} tokens, ±{float(first['range_ratio']):.0%}, T = {first['steps']}",
        fontsize=10,
    )
    return save(figure, target, "serving_load", rows[0])


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
        if row["batch_size"] in GOALS:
            goal = GOALS[row["batch_size"]]
            axis.hlines(goal, place - 0.4, place + 0.4, color=MUTED, linestyle="--")
            axis.text(place, goal, "goal", ha="center", va="bottom", fontsize=7, color=MUTED)
    axis.set_xticks(places, [row["batch_size"] for row in rows])
    axis.set_xlabel("requests in the batch")
    axis.set_ylabel("milliseconds a step")
    axis.set_title("Engine overhead: a step less model and sampler")
    axis.legend(fontsize=7)
    return save(figure, target, "serving_overhead", rows[0])
