"""Draw the benchmarks' tables again as PNG and SVG.

    python -m benchmarks.plots.draw [FOLDER] [--output FOLDER]

Needs matplotlib (`pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measuring.rows import DEFAULT_FOLDER
from benchmarks.plots import attention, requests, serving


def figures(source: Path, target: Path) -> list[Path]:
    """Draw all tables of a folder; returns the files."""
    kinds = (attention, requests, serving)
    return [path for kind in kinds for path in kind.draw(source, target)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER, help="of the CSVs")
    parser.add_argument("--output", type=Path, help="folder of the figures; default: the same")
    options = parser.parse_args(arguments)
    files = figures(options.folder, options.output or options.folder)
    if not files:
        parser.error(f"no table of a benchmark in {options.folder}")
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
