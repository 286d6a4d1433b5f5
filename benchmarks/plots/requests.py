"""Figures of the whole-request benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.rows import read_rows
from benchmarks.plots.style import COLOURS, MUTED, PART_COLOURS, length_label, pyplot, save

Row = dict[str, str]

PAPER: Final = {128: 1.25, 1024: 1.50}
"""Speed-ups over FlashAttention 2 at 64k, by T (SparseD, arXiv 2509.24014, figure 4)."""

PAPER_LENGTH: Final = 65536

PAIRS: Final = (
    ("ours, sparse", "ours, dense", "ours over the same engine, dense", "#c1272d"),
    ("ours, sparse, fp8", "ours, dense", "ours with fp8 over dense bfloat16", "#1b6ca8"),
    ("ours, sparse", "PyTorch, FlexAttention SparseD", "ours over FlexAttention loop", "#8e5ea2"),
    ("PyTorch, FlexAttention SparseD", "PyTorch, SDPA", "FlexAttention loop over SDPA", "#e08a1e"),
)
"""Numerator and denominator of a speed-up, its name and colour. Both loops are plain PyTorch's."""

KINDS: Final = ("dense", "building", "sparse")
PARTS: Final = ("attention", "pattern", "linear", "activation", "rest", "sampler", "overhead")


def draw(source: Path, target: Path) -> list[Path]:
    """Draw the tables of whole requests; returns the files."""
    files = []
    # A request that was run to its end is told in the tables; here all are extrapolated alike.
    totals = [
        row for row in read_rows(source / "request_totals.csv") if row["extrapolated"] == "True"
    ]
    if totals:
        files += _speed_ups(totals, target)
    parts = read_rows(source / "request_breakdown.csv")
    if parts:
        files += _breakdown(parts, target)
    return files


def provider_name(row: Mapping[str, str]) -> str:
    """A quantized provider is called by its quantization too: "ours, sparse, fp8"."""
    quantized = row["quantization"] != "none"
    return f"{row['provider']}, {row['quantization']}" if quantized else row["provider"]


def speed_ups(
    rows: Sequence[Mapping[str, str]], sparse: str, dense: str
) -> dict[tuple[str, int, int], float]:
    """Speed-up of one provider over another by (model, length, T); names as `provider_name`'s."""
    times: dict[tuple[str, str, int, int], float] = {}
    for row in rows:
        key = (row["model"], int(row["length"]), int(row["total_steps"]))
        times[provider_name(row), *key] = float(row["seconds"])
    return {
        (model, length, total): times[dense, model, length, total] / seconds
        for (provider, model, length, total), seconds in times.items()
        if provider == sparse and (dense, model, length, total) in times
    }


def _speed_ups(rows: list[Row], target: Path) -> list[Path]:
    models = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({int(row["length"]) for row in rows})
    totals = sorted({int(row["total_steps"]) for row in rows})
    bars = [
        (label, colour, values, total)
        for sparse, dense, label, colour in PAIRS
        if (values := speed_ups(rows, sparse, dense))
        for total in totals
    ]
    if not bars:
        return []
    plt = pyplot()
    size = (10.0, 0.4 + 2.9 * len(models))
    figure, axes = plt.subplots(len(models), 1, figsize=size, squeeze=False)
    width = 0.84 / len(bars)
    for axis, model in zip(axes[:, 0], models, strict=True):
        for index, (label, colour, values, total) in enumerate(bars):
            shift = (index - (len(bars) - 1) / 2) * width
            found = [
                (i + shift, values[model, length, total])
                for i, length in enumerate(lengths)
                if (model, length, total) in values
            ]
            if not found:
                continue
            x, y = zip(*found, strict=True)
            drawn = axis.bar(
                x,
                y,
                width * 0.92,
                color=colour,
                alpha=0.55 if total == totals[0] and len(totals) > 1 else 1.0,
                label=f"{label}, T = {total}",
            )
            axis.bar_label(drawn, fmt="%.2f", fontsize=6.5, padding=2, rotation=90)
        _paper(axis, lengths)
        axis.axhline(1.0, color=MUTED, linewidth=0.8)
        axis.set_xticks(range(len(lengths)), [length_label(n) for n in lengths])
        axis.set_ylabel("speed-up of a request")
        axis.set_title(f"{Path(model).name}, extrapolated from measured steps")
        axis.grid(axis="x", visible=False)
        axis.set_ylim(top=axis.get_ylim()[1] * 1.08)
    axes[-1, 0].set_xlabel("tokens, prompt and canvas")
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, target, "request_speed_ups", rows[0])


def _paper(axis: Any, lengths: list[int]) -> None:
    if PAPER_LENGTH not in lengths:
        return
    place = lengths.index(PAPER_LENGTH)
    for total, value in PAPER.items():
        axis.hlines(
            value,
            place - 0.48,
            place + 0.48,
            color=COLOURS["paper"],
            linestyle="-" if total == max(PAPER) else "--",
            label=f"paper, over FlashAttention 2, T = {total}",
        )


def _breakdown(rows: list[Row], target: Path) -> list[Path]:
    # Quantized weights are in the table alone, unless there is nothing else.
    rows = [row for row in rows if row["quantization"] == "none"] or rows
    panels = list(dict.fromkeys((row["model"], row["quantization"]) for row in rows))
    plt = pyplot()
    size = (8.0, 0.4 + 2.5 * len(panels))
    figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        share = {
            (int(row["length"]), row["kind"], row["part"]): 100 * float(row["share"])
            for row in rows
            if (row["model"], row["quantization"]) == panel
        }
        lengths = sorted({length for length, _, _ in share})
        steps = [(length, kind) for length in lengths for kind in KINDS]
        # A gap between lengths.
        places = [i + 0.6 * (i // len(KINDS)) for i in range(len(steps))]
        bottom = [0.0] * len(steps)
        for part in PARTS:
            heights = [share.get((*step, part), 0.0) for step in steps]
            axis.bar(places, heights, 0.85, bottom=bottom, color=PART_COLOURS[part], label=part)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
        labels = [f"{kind}\n{length_label(n)}" for n, kind in steps]
        axis.set_xticks(places, labels, fontsize=6.5)
        axis.set_ylabel("% of a step")
        model, quantization = panel
        weights = "" if quantization == "none" else f", {quantization}"
        axis.set_title(f"{Path(model).name}{weights}")
        axis.grid(axis="x", visible=False)
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, target, "request_breakdown", rows[0])
