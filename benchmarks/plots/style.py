"""How all figures look, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

INK: Final = "#222222"
MUTED: Final = "#777777"

COLOURS: Final = {
    "ours": "#c1272d",
    "ours, sparse": "#c1272d",
    "ours, dense": "#e8a0a2",
    "FlashAttention 4, block-sparse": "#1b6ca8",
    "FlashAttention 3, dense": "#444444",
    "FlashAttention 2, dense": "#8a8a8a",
    "cuDNN, dense": "#5b8c3e",
    "xformers, dense": "#a3a33c",
    "PyTorch on CPU, dense": "#8a8a8a",
    "FlexAttention, as released": "#e08a1e",
    "FlexAttention, full blocks": "#8e5ea2",
    "floor (matrix product)": "#bbbbbb",
    "PyTorch, SDPA": "#8a8a8a",
    "PyTorch, FlexAttention SparseD": "#e08a1e",
    "paper": "#1b6ca8",
}
"""One colour for each provider in every figure."""

PART_COLOURS: Final = {
    "attention": "#c1272d",
    "pattern": "#e8a0a2",
    "linear": "#1b6ca8",
    "activation": "#5b8c3e",
    "rest": "#e0b000",
    "sampler": "#8e5ea2",
    "overhead": "#444444",
    "scheduler": "#1b6ca8",
    "runner": "#c1272d",
    "output": "#5b8c3e",
}
"""One colour for each part of a step."""


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlesize": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "legend.frameon": False,
            "xtick.color": INK,
            "ytick.color": INK,
            "text.color": INK,
            # The same table gives the same file.
            "svg.hashsalt": "vllm_sparsed",
            # Letters as text: a quarter of the size.
            "svg.fonttype": "none",
        }
    )
    return plt


def save(figure: Any, folder: Path, name: str, row: dict[str, str]) -> list[Path]:
    """Write a figure as PNG and SVG, with the machine of a row below it.

    Returns:
        The two files.
    """
    versions = ", ".join(f"{key} {row[key]}" for key in ("torch", "triton", "vllm"))
    figure.text(0.01, 0.005, f"{row['device']}; {versions}; medians", color=MUTED, fontsize=7)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kind, metadata in (("png", None), ("svg", {"Date": None})):
        path = folder / f"{name}.{kind}"
        figure.savefig(path, dpi=100, metadata=metadata)
        files.append(path)
    pyplot().close(figure)
    return files


def length_label(length: int) -> str:
    """4096 as 4k."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
