"""The command line of the whole-request benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.measuring.rows import DEFAULT_FOLDER

MEASURED: Final = ("ours", "plain")
UNQUANTIZED: Final = "none"
MORE_STEPS: Final = 3
"""Times as many steps of short requests: theirs take milliseconds, and vary more."""
SMALL_MODELS: Final = ("tests/golden/llada-mha", "tests/golden/dream-gqa")
SMALL: Final[dict[str, Any]] = {
    "models": list(SMALL_MODELS),
    "lengths": [200],
    "canvas": 64,
    "block_size": 16,
    "dtype": "float32",
    "totals": [16, 64],
    "quantizations": [UNQUANTIZED],
    "more_steps_up_to": 0,
}
"""What --small sets unless it is given."""

USUAL: Final[dict[str, Any]] = {
    "models": ["llada-8b", "dream-7b"],
    "lengths": [65536, 32768, 16384, 4096],
    "canvas": 1024,
    "block_size": 128,
    "dtype": "bfloat16",
    "totals": [128, 1024],
    "quantizations": [UNQUANTIZED, "fp8"],
    "more_steps_up_to": 16384,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and fill in what it leaves out."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.requests.run",
        description="Whole requests at the shape of LLaDA-8B and Dream-7B.",
    )
    add = parser.add_argument
    add("--small", action="store_true", help="tiny models and lengths, for a CPU")
    add("--models", nargs="+", help="folders of benchmarks/shapes, or paths")
    add("--lengths", type=int, nargs="+", help="prompt and canvas, in tokens; in this order")
    add("--plain-lengths", type=int, nargs="+", help="of the plain loops; default: --lengths")
    add("--measure", nargs="+", choices=MEASURED, default=list(MEASURED))
    add("--quantizations", nargs="+", help=f"of our linear layers: {UNQUANTIZED}, fp8")
    add("--canvas", type=int)
    add("--skip", type=float, default=0.2)
    add("--select", type=float, default=0.3)
    add("--block-size", type=int)
    add("--totals", type=int, nargs="+", help="T of the extrapolated requests")
    add(
        "--whole", type=int, nargs="*", default=[], help="lengths to run to the end, at the first T"
    )
    add("--dense-steps", type=int, default=2, help="to time, of each loop")
    add("--sparse-steps", type=int, default=2, help="to time, of each loop")
    add(
        "--more-steps-up-to",
        type=int,
        help=f"so short, our engine times {MORE_STEPS} times as many steps",
    )
    add(
        "--few-steps-from",
        type=int,
        default=49152,
        help="so long, the plain loops time one step of each kind, with few layers' patterns",
    )
    add("--pattern-layers", type=int, default=2, help="these few layers; 0: all")
    add("--no-profile", action="store_true", help="no breakdown of steps")
    add("--dtype")
    add("--backend", default="sparsed", help="attention backend of our engine")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--minutes", type=float, help="start nothing more after so many")
    add("--time-limit", type=float, default=900.0, help="seconds of one process")
    add("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSVs")
    add("--resume", action="store_true", help="keep the folder's rows, measure what they lack")
    add("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.small else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.plain_lengths is None:
        options.plain_lengths = options.lengths
    if options.backend.lower() != "sparsed" and "ours" in options.measure:
        parser.error(
            "--backend must be sparsed, whose dense steps are the dense engine; "
            "benchmarks.engine.step_time times other backends"
        )
    if min(options.dense_steps, options.sparse_steps) < 1:
        parser.error("--dense-steps and --sparse-steps must be at least 1")
    for name in ("lengths", "plain_lengths", "whole"):
        if min(getattr(options, name), default=options.canvas + 1) <= options.canvas:
            parser.error(
                f"--{name.replace('_', '-')} must be above --canvas, {options.canvas}: "
                "there is no prompt"
            )
    return options
