"""What was aimed at, what was measured, and whether that is enough: one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from benchmarks.kernels.cases import SHAPES
from benchmarks.measuring.rows import read_rows
from benchmarks.plots.requests import speed_ups
from benchmarks.plots.style import length_label
from benchmarks.plots.summary_tables import Table, attention_times
from benchmarks.requests.step_times import steps_by_kind
from vllm_sparsed.planning.crossover import Crossover
from vllm_sparsed.planning.kernel_costs import FLASH_ATTENTION_4, attention_costs

Row = Mapping[str, str]

MODEL: Final = "llada-8b"
DENSE: Final = "FlashAttention 3, dense"
PEER: Final = "FlashAttention 4, block-sparse"

REQUESTS: Final = (
    ("ours, sparse", "ours, dense", "the same engine, dense", 65536, {1024: 1.6, 128: 1.55}, None),
    ("ours, sparse", "ours, dense", "the same engine, dense", 32768, {1024: 1.4, 128: 1.4}, None),
    ("ours, sparse", "ours, dense", "the same engine, dense", 16384, {1024: 1.2, 128: 1.2}, None),
    ("ours, sparse", "ours, dense", "the same engine, dense", 4096, {1024: 1.0, 128: 1.0}, None),
    (
        *("ours, sparse", "PyTorch, FlexAttention SparseD", "the FlexAttention loop", 65536),
        *({1024: 1.65, 128: 1.65}, 1.8),
    ),
    (
        *("ours, sparse, fp8", "ours, dense", "dense bfloat16, with fp8", 65536),
        *({1024: 1.9, 128: 1.9}, 2.2),
    ),
)
"""Of a whole request: providers, what the speed-up is over, tokens, least value by T, stretch."""

OTHERS: Final = 0.05
"""Share of a step that is neither attention nor linear layers, at most."""

SHORT_LENGTH: Final = 256
SHORT_STEP: Final = 1.3
"""A short step's time in units of its weight reads and products, at most."""

OVERHEAD_MS: Final = {"1": 2.0, "64": 5.0}
"""Engine overhead a step by batch size, at most."""

HOPPER: Final = ("H100", "H200")
"""Names of devices of compute capability 9.0."""

TOTALS: Final = (8, 32, 128, 1024)
SKIP: Final = 0.2


@dataclass(frozen=True, slots=True)
class Goal:
    """One line of the table.

    Attributes:
        name: what is measured.
        measured: None where it was not.
        bound: what it should be at least, or at most; None: only told, for comparison.
        at_most: whether the bound is an upper one.
        stretch: a further bound.
        unit: "x" a ratio, "%" a share, "ms" milliseconds.
    """

    name: str
    measured: float | None
    bound: float | None
    at_most: bool = False
    stretch: float | None = None
    unit: str = "x"

    def cells(self) -> list[str]:
        """Name, bound, figure, and whether it is met."""
        bound = "-"
        if self.bound is not None:
            bound = f"{'at most' if self.at_most else 'at least'} {self._text(self.bound)}"
        if self.stretch is not None:
            bound += f", stretch {self._text(self.stretch)}"
        measured = "-" if self.measured is None else self._text(self.measured)
        return [self.name, bound, measured, self.met()]

    def met(self) -> str:
        """In a word or two."""
        if self.measured is None:
            return "not measured"
        if self.bound is None:
            return "-"
        if self.stretch is not None and self._reaches(self.measured, self.stretch):
            return "yes, stretch too"
        return "yes" if self._reaches(self.measured, self.bound) else "no"

    def _reaches(self, measured: float, bound: float) -> bool:
        return measured <= bound if self.at_most else measured >= bound

    def _text(self, value: float) -> str:
        # One digit more than the bounds have: what misses one must not look like it.
        formats = {"x": f"{value:.3f}", "%": f"{value:.1%}", "ms": f"{value:.3f} ms"}
        return formats[self.unit]


def goals_table(folder: Path) -> Table:
    """All goals, measured or not."""
    attention = read_rows(folder / "attention.csv")
    found = (
        *kernel_goals(attention),
        never_slower(attention, read_rows(folder / "patterns.csv")),
        *request_goals(read_rows(folder / "request_totals.csv")),
        *breakdown_goals(read_rows(folder / "request_breakdown.csv")),
        short_step_goal(read_rows(folder / "step_time.csv")),
        *overhead_goals(read_rows(folder / "overhead.csv")),
    )
    return Table(
        "goals",
        "Goals",
        "Set for one H200, LLaDA-8B's shape and bfloat16. Whole requests have a canvas of 1024, "
        "skip 0.2, select 0.3 and blocks of 128, and are extrapolated from measured steps.",
        ("goal", "aimed at", "measured", "met"),
        [goal.cells() for goal in found],
    )


def kernel_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """The block-sparse kernel against its best peer, and small blocks against large ones."""
    times = attention_times(rows)
    rates = {row["case"]: float(row["tflops"]) for row in rows if _is_ours(row)}
    for length in (65536, 16384, 4096):
        of_case = times.get(_case(length, 128), {})
        ours, peer = of_case.get("ours"), of_case.get(PEER)
        yield Goal(
            f"kernel of this package, block 128, 30%, {length_label(length)}: rate over "
            "FlashAttention 4 block-sparse",
            peer / ours if ours and peer else None,
            1.0 if length == 65536 else None,
        )
    for block, bound in ((64, 0.85), (32, 0.6)):
        for length in (65536, 16384):
            small, large = rates.get(_case(length, block)), rates.get(_case(length, 128))
            yield Goal(
                f"kernel, block {block}, 30%, {length_label(length)}: share of block 128's rate",
                small / large if small and large else None,
                bound,
                unit="%",
            )


def never_slower(attention: Sequence[Row], patterns: Sequence[Row]) -> Goal:
    """Attention of the steps that are sparse by prediction, patterns included, over dense.

    The worst of all single requests of the attention table and of TOTALS steps. Where a pattern's
    time was not measured, the predicted one stands in; where FlashAttention 4 was measured, it
    attends for the requests that are given to it.
    """
    times = attention_times(attention)
    building = {
        (row["shape"], row["length"], row["block_size"], row["canvas"]): float(row["ms"])
        for row in patterns
        if row["ms"] and row["provider"] == "ours" and row["lse"] == "given"
    }
    ratios = []
    for row in attention:
        of_case = times.get(row["case"], {})
        dense = of_case.get(DENSE)
        if not (_is_ours(row) and dense and row["batch"] == "1" and row["head_dim"] == "128"):
            continue
        if row["dtype"] != "bfloat16" or not any(name in row["device"] for name in HOPPER):
            continue
        length, block = int(row["lengths"]), int(row["block_size"])
        canvas = 1024 if length > 2048 else 256
        heads, kv_heads = SHAPES[row["shape"]]
        ratio = heads // kv_heads
        peer = FLASH_ATTENTION_4.get(((9, 0), 128, ratio)) if PEER in of_case else None
        costs = attention_costs((9, 0), 128, torch.bfloat16, heads_per_kv_head=ratio, fa4=peer)
        sparse = of_case[PEER] if peer and peer.chosen(length, block) else float(row["ms"])
        predicted = Crossover(costs, heads, 128).predict(
            length, canvas, block, float(row["select"])
        )
        key = (row["shape"], row["lengths"], row["block_size"], str(canvas))
        build = building.get(key, predicted.build * 1e3)
        for total in TOTALS:
            steps = steps_by_kind(total, SKIP, sparse=True)["sparse"]
            if predicted.sparse_pays(steps):
                ratios.append((build + steps * sparse) / (steps * dense))
    return Goal(
        f"attention where the backend chooses sparse, T = {', '.join(map(str, TOTALS))}, "
        f"patterns included: worst time over dense ({len(ratios)} choices)",
        max(ratios, default=None),
        1.0,
        at_most=True,
    )


def request_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Speed-ups of whole requests."""
    rows = [row for row in rows if row["extrapolated"] == "True"]
    for sparse, dense, over, length, bounds, stretch in REQUESTS:
        found = {
            (length, total): value
            for (model, length, total), value in speed_ups(rows, sparse, dense).items()
            if Path(model).name == MODEL
        }
        for total, bound in bounds.items():
            yield Goal(
                f"request, {length_label(length)}, T = {total}: speed-up over {over}",
                found.get((length, total)),
                bound,
                stretch=stretch,
            )


def breakdown_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """What of a step is neither attention nor linear layers; the larger of dense and sparse."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if Path(row["model"]).name == MODEL and row["quantization"] == "none":
            found.setdefault((row["length"], row["kind"]), {})[row["part"]] = float(row["ms"])
    for length in (4096, 16384, 32768, 65536):
        shares = []
        for kind in ("dense", "sparse"):
            parts = found.get((str(length), kind), {})
            if parts:
                main = sum(parts[part] for part in ("attention", "pattern", "linear"))
                shares.append(1.0 - main / sum(parts.values()))
        yield Goal(
            f"step, {length_label(length)}: neither attention nor linear layers",
            max(shares, default=None),
            OTHERS,
            at_most=True,
            unit="%",
        )


def short_step_goal(rows: Sequence[Row]) -> Goal:
    """A short step against its matrix products, which read every weight."""
    ratios = [
        float(row["dense_step_ms"]) / float(row["products_ms"])
        for row in rows
        if Path(row["model"]).name == MODEL
        and row["length"] == str(SHORT_LENGTH)
        and row["dtype"] == "bfloat16"
        and not row["quantization"]
        and row["dense_step_ms"]
        and row["products_ms"]
    ]
    return Goal(
        f"step, {SHORT_LENGTH} tokens: time over that of weight reads and products",
        ratios[-1] if ratios else None,
        SHORT_STEP,
        at_most=True,
    )


def overhead_goals(rows: Sequence[Row]) -> Iterator[Goal]:
    """Scheduler, runner and output."""
    found = {row["batch_size"]: float(row["overhead_ms"]) for row in rows}
    for batch_size, bound in OVERHEAD_MS.items():
        yield Goal(
            f"engine overhead a step, batch {batch_size}",
            found.get(batch_size),
            bound,
            at_most=True,
            unit="ms",
        )


def _is_ours(row: Row) -> bool:
    return row["provider"] == "ours" and bool(row["ms"])


def _case(length: int, block_size: int) -> str:
    return f"llada-{length_label(length)}-b{block_size}-30%"
