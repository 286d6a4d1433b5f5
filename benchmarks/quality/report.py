"""Merge the answers of all parts of an evaluation: quality.csv, summary.md and the plots.

    python -m benchmarks.quality.report quality

Nothing is measured here, so plots can be drawn again at any time.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from benchmarks.quality.results import (
    ALL_TASKS,
    Row,
    asked_of_all,
    main_settings,
    merged_records,
    pooled_rows,
    summarize,
    write_rows,
)
from benchmarks.quality.settings import Setting
from benchmarks.quality.similarity import FILE_NAME, Overlap, read_overlaps
from small_model.tasks import TASKS

LEAST_SPARSE_TOKENS: Final = 0.6  # of the answers: with less, sparse attention was hardly tried
_LARGEST_SKIP: Final = 0.2  # up to which that is expected


def report_folder(folder: Path, plots: bool = True) -> str:
    """Write quality.csv, summary.md and plots of a folder with answers.

    Returns:
        The summary, in markdown.

    Raises:
        ValueError: the answers are not those of all parts of one run.
    """
    records = merged_records(folder)
    rows = summarize(records)
    write_rows(folder / "quality.csv", rows)
    similarity = folder / FILE_NAME
    overlaps = read_overlaps(similarity) if similarity.exists() else []
    text = summary(rows, overlaps)
    (folder / "summary.md").write_text(text)
    if plots:
        from benchmarks.quality.plots import draw_all

        drawn = draw_all(folder, rows, summarize(asked_of_all(records)), overlaps)
        text += f"\nPlots: {', '.join(drawn) or 'none, matplotlib is missing'}\n"
    return text


def summary(rows: Sequence[Row], overlaps: Sequence[Overlap]) -> str:
    """Tables in markdown: by task and length, all settings, settings by task, pattern overlaps."""
    main = main_settings(rows)
    parts = [
        "Exact match in percent with its 95% interval (Wilson), n documents; for others than dense "
        "also the difference to dense attention on the same documents in points, with its paired "
        "95% interval (Newcombe 1998, method 10).\n",
        _by_length(rows, main),
        "All tasks together. Density: share of the key blocks that a pattern keeps. Rows a token: "
        "rows that all passes of an answer computed, by its tokens. Seconds: of an answer, in a "
        "batch. Sparse tokens: share of the answers' tokens decided in steps with sparse "
        "attention. Same answer: as with dense attention, right or wrong.\n",
        _all_settings(rows),
        "The same settings by task: exact match in percent.\n",
        _by_task(rows),
    ]
    if overlaps:
        parts += [
            "Overlap of SparseD's patterns in a dense run, 2 |A and B| / (|A| + |B|); patterns "
            "chosen at random would have the density.\n",
            _overlap_table(overlaps),
        ]
    return "\n".join([*parts, *warnings(rows)])


def setting_line(row: Row) -> str:
    """One row as a line of text."""
    density = "" if row.density is None else f", density {row.density:.3f}"
    return (
        f"{row.setting.name}; {row.length} tokens: {row.exact_match:.1%} "
        f"[{row.low:.1%}, {row.high:.1%}] of {row.documents}{density}, "
        f"{row.steps:g} steps, {row.sparse_tokens:.0%} of the tokens in sparse steps"
    )


def warnings(rows: Iterable[Row]) -> list[str]:
    """What makes a row say little about sparse attention."""
    found = []
    for row in rows:
        skip = row.setting.skip or 0.0
        if row.setting.is_dense or skip > _LARGEST_SKIP or row.task != ALL_TASKS:
            continue
        if row.sparse_tokens < LEAST_SPARSE_TOKENS:
            found.append(
                f"Note: {row.setting.name}; {row.length} tokens: only {row.sparse_tokens:.0%} of "
                f"the answers' tokens were decided in sparse steps, {row.steps:g} steps taken. An "
                "answer ends as soon as its end token has no mask before it; `--alg random` "
                "decides tokens in an order without preference.\n"
            )
    return found


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _percent(row: Row) -> str:
    return f"{row.exact_match:.1%} [{row.low:.1%}, {row.high:.1%}]".replace("%", "")


def _points(row: Row) -> str:
    if row.difference is None or row.difference_low is None or row.difference_high is None:
        return "-"
    values = (row.difference, row.difference_low, row.difference_high)
    middle, low, high = (f"{100 * value:+.1f}" for value in values)
    return f"{middle} [{low}, {high}]"


def _by_length(rows: Sequence[Row], settings: Sequence[Setting]) -> str:
    found = {(row.setting, row.task, row.length): row for row in rows}
    header = ["task", "length", "n"]
    for setting in settings:
        header += [setting.name] if setting.is_dense else [setting.name, "difference"]
    body = []
    tasks = [t for t in (*TASKS, ALL_TASKS) if any(row.task == t for row in rows)]
    lengths = sorted({row.length for row in rows if row.setting in settings})
    for task in tasks:
        for length in lengths:
            cells = [found.get((setting, task, length)) for setting in settings]
            if not any(cells):
                continue
            line = [task, str(length), str(max(cell.documents for cell in cells if cell))]
            for setting, cell in zip(settings, cells, strict=True):
                line.append("-" if cell is None else _percent(cell))
                if not setting.is_dense:
                    line.append("-" if cell is None else _points(cell))
            body.append(line)
    return table(header, body)


def _all_settings(rows: Sequence[Row]) -> str:
    header = ["setting", "length", "n", "density", "passes", "tokens a pass", "rows a token"]
    header += ["seconds", "sparse tokens", "same answer"]
    return table(
        [*header, "exact match", "difference to dense"],
        [
            [
                row.setting.name,
                str(row.length),
                str(row.documents),
                "-" if row.density is None else f"{row.density:.3f}",
                f"{row.steps:.1f}",
                f"{row.tokens_per_pass:.2f}",
                f"{row.rows_per_token:.0f}",
                f"{row.seconds:.3f}",
                f"{row.sparse_tokens:.0%}",
                "-" if row.same_answer is None else f"{row.same_answer:.0%}",
                _percent(row),
                _points(row),
            ]
            for row in pooled_rows(rows)
        ],
    )


def _by_task(rows: Sequence[Row]) -> str:
    found = {(row.setting, row.task, row.length): row for row in rows}
    tasks = [t for t in TASKS if any(row.task == t for row in rows)]
    body = []
    for pooled in pooled_rows(rows):
        cells = [found.get((pooled.setting, task, pooled.length)) for task in tasks]
        values = ["-" if cell is None else f"{100 * cell.exact_match:.1f}" for cell in cells]
        body.append([pooled.setting.name, *values])
    return table(["setting", *tasks], body)


def _overlap_table(overlaps: Sequence[Overlap]) -> str:
    body = []
    for block in dict.fromkeys(o.block_size for o in overlaps):
        for layer in sorted({o.layer for o in overlaps}):
            mine = [o for o in overlaps if (o.block_size, o.layer) == (block, layer)]
            steps = {(o.first, o.second): o.overlap for o in mine if o.kind == "steps"}
            last = max(first for first, _ in steps)
            heads = [o.overlap for o in mine if o.kind == "heads" and o.first < o.second]
            next_to = [steps[step, step + 1] for step in range(last)]
            values = (
                mine[0].density,
                sum(next_to) / len(next_to) if next_to else 1.0,
                steps[0, last],
                sum(heads) / len(heads) if heads else 1.0,
            )
            body.append([str(block), str(layer), *(f"{value:.3f}" for value in values)])
    return table(
        ["block", "layer", "density", "next step", "first and last step", "two heads"], body
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="--output of the evaluation")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args()
    try:
        print(report_folder(options.folder, plots=not options.no_plots))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
