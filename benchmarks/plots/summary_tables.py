"""The compact tables of a result folder: one row for each case, one column for each provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.measuring.rows import read_rows
from benchmarks.plots.requests import PAPER, PAPER_LENGTH, provider_name, speed_ups
from benchmarks.plots.style import length_label

Row = Mapping[str, str]

PARTS: Final = ("attention", "pattern", "linear", "activation", "rest", "sampler", "overhead")
PERCENTILES: Final = ("p50", "p90", "p99")
RATIOS: Final = (
    ("ours, sparse", "ours, dense", "ours, sparse over dense"),
    ("ours, sparse, fp8", "ours, dense", "fp8, sparse over dense bfloat16"),
    ("ours, sparse", "PyTorch, FlexAttention SparseD", "ours over FlexAttention loop"),
    ("ours, sparse", "PyTorch, SDPA", "ours over SDPA loop"),
    ("PyTorch, FlexAttention SparseD", "PyTorch, SDPA", "FlexAttention loop over SDPA loop"),
)
"""Numerator and denominator of a whole request's speed-up, and its column."""


@dataclass(frozen=True, slots=True)
class Table:
    """One table.

    Attributes:
        name: of its CSV file.
        title: heading of the report.
        note: what the figures are.
        header: columns.
        rows: cells as text.
    """

    name: str
    title: str
    note: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(folder: Path) -> list[Table]:
    """All tables that a result folder has rows for."""
    found = (
        attention_table(read_rows(folder / "attention.csv")),
        pattern_table(read_rows(folder / "patterns.csv")),
        request_table(read_rows(folder / "request_totals.csv")),
        step_table(
            read_rows(folder / "request_steps.csv"), read_rows(folder / "request_totals.csv")
        ),
        breakdown_table(read_rows(folder / "request_breakdown.csv")),
        serving_table(read_rows(folder / "serving.csv")),
        overhead_table(read_rows(folder / "overhead.csv")),
    )
    return [table for table in found if table.rows]


def attention_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of every provider on every case."""
    rows = [row for row in rows if row["ms"]]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    times = attention_times(rows)
    cases = {row["case"]: row for row in rows if row["provider"] == "ours"}
    cells = []
    for case, row in cases.items():
        of_case = times[case]
        cells.append(
            [
                *_attention_case(row),
                f"{float(row['tflops']):.0f}",
                *(number(of_case.get(provider)) for provider in providers),
            ]
        )
    return Table(
        "attention",
        "Attention kernels",
        "Milliseconds of one layer over the whole batch. Sparse providers leave out the blocks "
        "that the pattern drops; TFLOP/s count what they keep. The floor is the time of the kept "
        "products at the rate of a large matrix product measured in the same run.",
        ("shape", "tokens", "block", "density", "ours, TFLOP/s", *providers),
        cells,
    )


def attention_times(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds by case and provider; dense times, told once, in all cases they hold for."""
    dense = {
        (_dense_key(row), row["provider"]): float(row["ms"])
        for row in rows
        if row["ms"] and row["kind"] == "dense"
    }
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row["ms"]:
            continue
        of_case = found.setdefault(row["case"], {})
        for (key, provider), ms in dense.items():
            if key == _dense_key(row):
                of_case[provider] = ms
        if row["kind"] != "dense":
            of_case[row["provider"]] = float(row["ms"])
    return found


def _dense_key(row: Row) -> tuple[str, ...]:
    return (row["shape"], row["lengths"], row["head_dim"], row["dtype"])


def _attention_case(row: Row) -> list[str]:
    lengths = row["lengths"].split("+")
    tokens = length_label(int(lengths[0])) if len(lengths) == 1 else f"{len(lengths)} requests"
    special = [f"head_dim {row['head_dim']}"] if row["head_dim"] != "128" else []
    special += [row["dtype"]] if row["dtype"] != "bfloat16" else []
    shape = ", ".join([row["shape"], *special])
    return [shape, tokens, row["block_size"], f"{float(row['density']):.3f}"]


def pattern_table(rows: Sequence[Row]) -> Table:
    """Milliseconds to build one layer's patterns."""
    rows = [row for row in rows if row["ms"]]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    cases = {row["case"]: row for row in rows if row["provider"] == "ours"}
    times = {(row["case"], row["provider"]): float(row["ms"]) for row in rows}
    return Table(
        "patterns",
        "Building the patterns of one layer",
        "Milliseconds; TFLOP/s count one product of all queries and keys. The log-sum-exp is that "
        "of the dense step, or computed as well.",
        (
            *("shape", "tokens", "block", "canvas", "head_dim", "log-sum-exp", "ours, TFLOP/s"),
            *("ours, peak MiB", *providers),
        ),
        [
            [
                *(row["shape"], length_label(int(row["length"])), row["block_size"]),
                *(row["canvas"], row["head_dim"], row["lse"], f"{float(row['tflops']):.0f}"),
                number(float(row["peak_mib"])) if row["peak_mib"] else "-",
                *(number(times.get((case, provider))) for provider in providers),
            ]
            for case, row in cases.items()
        ],
    )


def request_table(rows: Sequence[Row]) -> Table:
    """Speed-ups of whole requests, the paper's beside them."""
    usual = [row for row in rows if row.get("extrapolated") == "True"]
    ratios = [speed_ups(usual, sparse, dense) for sparse, dense, _ in RATIOS]
    keys = sorted(
        {key for ratio in ratios for key in ratio}, key=lambda key: (key[0], key[2], key[1])
    )
    cells = [
        [Path(model).name, length_label(length), str(total)]
        + [f"{r[key]:.2f}" if (key := (model, length, total)) in r else "-" for r in ratios]
        + [f"{PAPER[total]:.2f}" if length == PAPER_LENGTH and total in PAPER else "-"]
        for model, length, total in keys
    ]
    return Table(
        "request_speed_ups",
        "Whole requests",
        "Speed-ups of whole requests of T steps, extrapolated from measured steps. The last column "
        "is the paper's figure 4: SparseD over FlashAttention 2.",
        ("model", "tokens", "T", *(column for _, _, column in RATIOS), "paper"),
        cells,
    )


def step_table(steps: Sequence[Row], totals: Sequence[Row]) -> Table:
    """Milliseconds of a step of each kind, seconds of whole requests."""
    seconds = {
        (*_request(row), row["total_steps"], row["extrapolated"]): float(row["seconds"])
        for row in totals
    }
    every_total = sorted({row["total_steps"] for row in totals}, key=int)
    wholes = sorted(
        {row["total_steps"] for row in totals if row["extrapolated"] == "False"}, key=int
    )
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in steps:
        if row["ms"]:
            found.setdefault(_request(row), {})[row["kind"]] = row
    cells = []
    for key, kinds in found.items():
        model, name, length = key
        first = next(iter(kinds.values()))
        of_kinds = [kinds.get(kind) for kind in ("dense", "building", "sparse")]
        cells.append(
            [
                *(Path(model).name, length_label(int(length)), name),
                *(number(float(row["ms"])) if row else "-" for row in of_kinds),
                *(number(seconds.get((*key, total, "True"))) for total in every_total),
                *(number(seconds.get((*key, total, "False"))) for total in wholes),
                f"{float(first['density']):.3f}" if first["density"] else "-",
                f"{float(first['peak_gib']):.1f}",
                first["note"],
            ]
        )
    return Table(
        "request_steps",
        "Steps and seconds of whole requests",
        "Medians of single steps in milliseconds: dense, dense and building the patterns, sparse. "
        "Seconds of whole requests are extrapolated from them, but for those run to the end.",
        (
            *("model", "tokens", "provider", "dense ms", "building ms", "sparse ms"),
            *(f"T = {total}, s" for total in every_total),
            *(f"T = {total} run to the end, s" for total in wholes),
            *("density", "peak GiB", "note"),
        ),
        cells,
    )


def _request(row: Row) -> tuple[str, ...]:
    return (row["model"], provider_name(row), row["length"])


def breakdown_table(rows: Sequence[Row]) -> Table:
    """Milliseconds of a step's parts."""
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = (row["model"], row["length"], row["quantization"], row["kind"])
        found.setdefault(key, {})[row["part"]] = float(row["ms"])
    cells = []
    for (model, length, quantization, kind), parts in found.items():
        # Everything but attention, its patterns and the linear layers.
        others = sum(parts[part] for part in ("activation", "rest", "sampler", "overhead"))
        total = sum(parts.values())
        cells.append(
            [Path(model).name, length_label(int(length)), quantization, kind]
            + [number(parts[part]) for part in PARTS]
            + [f"{others / total:.1%}"]
        )
    return Table(
        "request_breakdown",
        "Where a step's time goes",
        "Milliseconds of kernel time in our engine; overhead is the clock less all kernels. The "
        "last column is what is neither attention, its patterns nor linear layers.",
        ("model", "tokens", "quantization", "step", *PARTS, "others"),
        cells,
    )


def serving_table(rows: Sequence[Row]) -> Table:
    """Throughput and latency percentiles by load."""
    return Table(
        "serving",
        "Serving",
        "`vllm bench serve`; prompts and canvases vary evenly around their means. Sparse is the "
        "server's default: requests that it would not make faster stay dense. Milliseconds are the "
        "median, the 90th and the 99th percentile.",
        (
            *("model", "clients", "attention", "prompt", "canvas", "T", "completed"),
            *("output tokens/s", "total tokens/s", "first block ms", "latency ms"),
        ),
        [
            [
                *(Path(row["model"]).name, row["clients"], row["attention"]),
                *(
                    f"{row[x]} ±{float(row['range_ratio']):.0%}"
                    for x in ("input_len", "output_len")
                ),
                *(row["steps"], f"{row['completed']} of {row['requests']}"),
                *(number(float(row[f"{x}_tokens_per_s"])) for x in ("output", "total")),
                *(
                    " / ".join(f"{float(row[f'{x}_ms_{p}']):.0f}" for p in PERCENTILES)
                    for x in ("first_block", "latency")
                ),
            ]
            for row in rows
            if row["output_tokens_per_s"]
        ],
    )


def overhead_table(rows: Sequence[Row]) -> Table:
    """Overhead of an engine step by batch size."""
    columns = ("wall", "overhead", "scheduler", "runner", "output", "model", "sampler")
    return Table(
        "overhead",
        "Engine overhead",
        "Milliseconds a step of a tiny model; overhead is scheduler, runner and output.",
        ("batch size", *columns),
        [[row["batch_size"], *(number(float(row[f"{x}_ms"])) for x in columns)] for row in rows],
    )


def number(value: float | None) -> str:
    """Three or four digits, "-" for None."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def missing(rows: Iterable[Row], keys: Sequence[str], figure: str) -> dict[str, list[str]]:
    """What was not measured: labels by the reason that is given.

    Args:
        rows: of one file.
        keys: columns that a label is made of.
        figure: column that is empty where nothing was measured.
    """
    rows = list(rows)
    measured = {tuple(row[key] for key in keys) for row in rows if row[figure]}
    found: dict[str, list[str]] = {}
    for row in rows:
        key = tuple(row[key] for key in keys)
        label = " ".join(x for x in key if x)
        if key not in measured and row["note"] and label not in found.get(row["note"], ()):
            found.setdefault(row["note"], []).append(label)
    return found
