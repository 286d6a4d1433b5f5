"""Speed of the block-sparse attention against dense and sparse peers.

    python -m benchmarks.kernels.attention               the usual set, in order of importance
    python -m benchmarks.kernels.attention --full        every length, block size and density
    python -m benchmarks.kernels.attention --small       three tiny cases, for a CPU
    python -m benchmarks.kernels.attention --minutes 2.5 --lengths 65536 --resume

Every provider is checked against float64 before it is timed, and all run in one process. TFLOP/s
count the kept blocks of sparse providers and all blocks of dense ones. The floor is what the kept
blocks' products alone would take at the rate of a large matrix product, measured in the same run.
Dense attention does not depend on the pattern: it is timed once for each shape and length. What has
to compile for every shape (FlexAttention) comes last, so that a time budget cuts that first. Each
row is written as soon as it is measured; `--resume` keeps the rows of a folder and measures what
they lack. A provider that this machine does not have is named, in the output and in the table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.kernels.cases import FULL, SMALL, USUAL, Case, unique
from benchmarks.kernels.inputs import Inputs, verify
from benchmarks.kernels.providers import ON_CPU, PROVIDERS
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.measuring.timing import synchronize, time_calls

FILE: Final = "attention.csv"
COLUMNS: Final = (
    *("case", "shape", "num_heads", "num_kv_heads", "head_dim", "dtype", "lengths", "batch"),
    *("tokens", "block_size", "select", "density", "provider", "kind", "ms_p20", "ms", "ms_p80"),
    *("tflops", "error", "prepare_s", "note"),
)
FLOOR: Final = "floor (matrix product)"


class Runner:
    """Measures providers on cases, one row each."""

    def __init__(
        self,
        device: str,
        repetition_ms: float,
        deadline: Deadline | None = None,
        done: RowFile | None = None,
    ) -> None:
        """Prepare.

        Args:
            device: "cuda" or "cpu".
            repetition_ms: time to spend on the repetitions of one provider.
            deadline: after it nothing is measured any more.
            done: rows that need not be measured again.
        """
        self.device = device
        self.repetition_ms = repetition_ms
        self.deadline = deadline or Deadline()
        self._done = done
        self._dense_done: set[tuple[object, ...]] = set()

    def rows(self, cases: Sequence[Case], providers: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows; those of providers that compile for every shape after all others."""
        present = []
        for name in providers:
            absence = PROVIDERS[name].absent(self.device)
            if absence:
                yield {"case": "", "provider": name, "kind": _kind(name), "note": absence}
            else:
                present.append(name)
        rate = matrix_product_rate(self.device)
        for compiles in (False, True):
            names = [name for name in present if PROVIDERS[name].compiles == compiles]
            for case in cases if names else ():
                wanted = [name for name in names if self._is_wanted(case, name)]
                if not wanted:
                    continue
                torch.manual_seed(0)
                x = Inputs.random(case, self.device)
                if not (compiles or self._is_done(case, FLOOR)):
                    yield floor(x, rate)
                for name in wanted:
                    yield self.measure(x, name)
                del x
                if self.device == "cuda":
                    torch.cuda.empty_cache()

    def _is_wanted(self, case: Case, name: str) -> bool:
        if not PROVIDERS[name].sparse:
            if (name, *case.dense_key) in self._dense_done:
                return False
            self._dense_done.add((name, *case.dense_key))
        return not self._is_done(case, name)

    def _is_done(self, case: Case, name: str) -> bool:
        if self._done is None:
            return False
        of_case: dict[str, object] = {"case": case.label}
        if name in PROVIDERS and not PROVIDERS[name].sparse:
            told = describe(case)
            of_case = {key: told[key] for key in ("shape", "lengths", "head_dim", "dtype")}
        return self._done.holds("ms", provider=name, **of_case)

    def measure(self, x: Inputs, name: str) -> dict[str, Any]:
        """Check one provider and time it; its note says why there is no time."""
        provider = PROVIDERS[name]
        density = x.density if provider.sparse else 1.0
        row = describe(x.case) | {"provider": name, "kind": _kind(name), "density": density}
        refusal = provider.refusal(x.case, self.device)
        if not refusal and self.deadline.passed:
            refusal = self.deadline.note
        if refusal:
            return row | {"note": refusal}
        started = time.perf_counter()
        try:
            run = provider.make(x)
            error = verify(run(), x, provider.sparse)
            prepared = time.perf_counter() - started
            ms = time_calls(run, self.device, self.repetition_ms)
        except Exception as problem:
            # A device error stays: no later figure could be trusted.
            synchronize(self.device)
            return row | {"note": reason(problem)}
        times = {"ms_p20": ms.p20, "ms": ms.p50, "ms_p80": ms.p80}
        rate = {"tflops": x.flops(density) / ms.p50 / 1e9}
        return row | times | rate | {"error": error, "prepare_s": prepared}


def floor(x: Inputs, rate: float) -> dict[str, Any]:
    """The row of what no kernel can be faster than."""
    return describe(x.case) | {
        "provider": FLOOR,
        "kind": "floor",
        "density": x.density,
        "ms": x.flops(x.density) / rate * 1e3,
        "tflops": rate / 1e12,
        "note": "computed: kept FLOPs at the measured rate of a large matrix product",
    }


def matrix_product_rate(device: str) -> float:
    """FLOP/s of a large square product, bfloat16 on CUDA and float32 on a CPU."""
    size, dtype = (16384, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    ms = time_calls(lambda: torch.mm(a, b, out=out), device, 200.0 if device == "cuda" else 20.0)
    return 2.0 * size**3 / ms.p50 * 1e3


def describe(case: Case) -> dict[str, Any]:
    """The columns that say what was run."""
    return {
        "case": case.label,
        "shape": case.shape,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "lengths": "+".join(map(str, case.lengths)),
        "batch": len(case.lengths),
        "tokens": case.num_tokens,
        "block_size": case.block_size,
        "select": case.select,
    }


def line(row: dict[str, Any]) -> str:
    """One row as a line of the printed table."""
    times = [f"{row[name]:.3f}" if name in row else "-" for name in ("ms_p20", "ms", "ms_p80")]
    density = f"{row['density']:.4f}" if "density" in row else "-"
    rate = f"{row['tflops']:.0f}" if "tflops" in row else "-"
    note = "" if row["kind"] == "floor" else row.get("note", "")
    return (
        f"{row['case']:24} {row['provider']:31} {density:>7} "
        f"{times[0]:>9} {times[1]:>9} {times[2]:>9} {rate:>8} {note}"
    )


def _kind(name: str) -> str:
    return "sparse" if PROVIDERS[name].sparse else "dense"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `device` and `chosen`, the cases, are filled in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="every length, block and density")
    which.add_argument("--small", action="store_true", help="three tiny cases, for a CPU")
    parser.add_argument("--cases", nargs="+", default=[], help="only cases whose label holds this")
    parser.add_argument("--lengths", type=int, nargs="+", help="only single requests so long")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all")
    parser.add_argument("--repetition-ms", type=float, default=None, help="per provider and case")
    parser.add_argument("--minutes", type=float, help="measure nothing more after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what is there")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    parser.add_argument(
        "--resume", action="store_true", help="keep the folder's rows, measure what they lack"
    )
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cpu" and not options.small:
        parser.error("only --small runs on a CPU")
    if options.providers is None:
        options.providers = [n for n in PROVIDERS if n != ON_CPU or options.device == "cpu"]
    options.chosen = unique(SMALL if options.small else FULL if options.full else USUAL)
    if options.cases:
        options.chosen = [c for c in options.chosen if any(p in c.label for p in options.cases)]
        if not options.chosen:
            parser.error(f"--cases {' '.join(options.cases)}: no case has such a label")
    if options.lengths:
        wanted = [(length,) for length in options.lengths]
        options.chosen = [case for case in options.chosen if case.lengths in wanted]
        if not options.chosen:
            parser.error(f"--lengths {' '.join(map(str, options.lengths))}: no case is so long")
    if options.repetition_ms is None:
        options.repetition_ms = 5.0 if options.small else 100.0
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    started = time.perf_counter()
    file = RowFile(options.output / FILE, COLUMNS, append=options.resume)
    runner = Runner(
        options.device,
        options.repetition_ms,
        Deadline(options.minutes),
        file if options.resume else None,
    )
    print(headline())
    print(
        f"{'case':24} {'provider':31} {'density':>7} {'p20 ms':>9} {'median ms':>9} "
        f"{'p80 ms':>9} {'TFLOP/s':>8}"
    )
    for row in runner.rows(options.chosen, options.providers):
        file.add(row)
        print(line(row), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; rows in {file.path}")


if __name__ == "__main__":
    main()
