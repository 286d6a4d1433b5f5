"""Figures of the attention benchmark."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from benchmarks.measuring.rows import read_rows
from benchmarks.plots.style import COLOURS, length_label, pyplot, save

Row = dict[str, str]

REFERENCES = ("FlashAttention 3, dense", "PyTorch on CPU, dense")
"""Dense attention that speed-ups refer to: the first that was measured."""

_MARKS = {"128": ("o", "-"), "64": ("s", "--"), "32": ("^", ":"), "16": ("v", ":")}


def draw(source: Path, target: Path) -> list[Path]:
    """Draw attention.csv; returns the files, none where there is no such table."""
    rows = [row for row in read_rows(source / "attention.csv") if row["ms"]]
    if not rows:
        return []
    usual = Counter((row["head_dim"], row["dtype"]) for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if (row["head_dim"], row["dtype"]) == usual]
    return [*_lengths(rows, target), *_densities(rows, target)]


def _dense_times(rows: list[Row], provider: str) -> dict[tuple[str, str], float]:
    return {
        (row["shape"], row["lengths"]): float(row["ms"])
        for row in rows
        if row["provider"] == provider
    }


def _order(provider: str) -> float:
    """Ours lies above what it may hide."""
    return 3.0 if provider == "ours" else 2.0


def _lengths(rows: list[Row], target: Path) -> list[Path]:
    """Speed-up over dense attention by length, one panel for each shape."""
    reference = next((r for r in REFERENCES if _dense_times(rows, r)), None)
    if reference is None:
        return []
    base = _dense_times(rows, reference)
    single = [row for row in rows if row["batch"] == "1"]
    share = Counter(row["select"] for row in single).most_common(1)[0][0]
    # Dense times are told once, with whatever share was measured first.
    single = [row for row in single if row["kind"] == "dense" or row["select"] == share]
    shapes = list(dict.fromkeys(row["shape"] for row in single))
    plt = pyplot()
    figure, axes = plt.subplots(1, len(shapes), figsize=(5.2 * len(shapes), 4.4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for row in single:
            if row["shape"] != shape or (shape, row["lengths"]) not in base:
                continue
            block = "" if row["kind"] == "dense" else row["block_size"]
            if row["provider"] != "ours" and block not in ("", "128"):
                # Peers' small blocks are in the table alone: too many lines.
                continue
            ratio = base[shape, row["lengths"]] / float(row["ms"])
            lines.setdefault((row["provider"], block), {})[int(row["lengths"])] = ratio
        for (provider, block), points in lines.items():
            marker, style = _MARKS.get(block, ("x", "-"))
            label = f"{provider}, block {block}" if block else provider
            x, y = zip(*sorted(points.items()), strict=True)
            axis.plot(
                x,
                y,
                style,
                marker=marker,
                markersize=4,
                color=COLOURS.get(provider, "#000000"),
                label=label,
                zorder=_order(provider),
            )
        lengths = sorted({int(row["lengths"]) for row in single if row["shape"] == shape})
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [length_label(n) for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel("tokens")
        axis.set_ylabel(f"speed-up over {reference}")
        heads = next(r for r in single if r["shape"] == shape)
        axis.set_title(
            f"{shape} ({heads['num_heads']}/{heads['num_kv_heads']} heads), "
            f"{float(share):.0%} of the blocks kept"
        )
    axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, target, "attention_lengths", rows[0])


def _densities(rows: list[Row], target: Path) -> list[Path]:
    """Time by density at the length for which most densities were measured."""
    sparse = [row for row in rows if row["kind"] != "dense" and row["batch"] == "1"]
    keys = ("shape", "lengths", "block_size")
    measured = {(*(row[key] for key in keys), row["select"]) for row in sparse}
    counted = Counter(item[:3] for item in measured)
    # Of several as good, the longest.
    shape, lengths, block = max(counted, key=lambda item: (counted[item], int(item[1])))
    if counted[shape, lengths, block] < 2:
        return []
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 4.2))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in sparse:
        if tuple(row[key] for key in keys) == (shape, lengths, block):
            lines.setdefault(row["provider"], []).append((float(row["density"]), float(row["ms"])))
    for provider, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        colour = COLOURS.get(provider, "#000000")
        order = _order(provider)
        axis.plot(x, y, "-o", markersize=4, color=colour, label=provider, zorder=order)
    for row in rows:
        if row["kind"] == "dense" and (row["shape"], row["lengths"]) == (shape, lengths):
            colour = COLOURS.get(row["provider"], "#000000")
            axis.axhline(float(row["ms"]), linestyle="--", color=colour, label=row["provider"])
    axis.set_xlim(0, 1.02)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("share of the blocks kept")
    axis.set_ylabel("milliseconds")
    axis.set_title(f"{shape}, {length_label(int(lengths))} tokens, blocks of {block}")
    axis.legend(fontsize=7)
    return save(figure, target, "attention_densities", rows[0])
