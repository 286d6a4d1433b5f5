"""Speed of the block-sparse attention against dense and sparse peers.

    python -m benchmarks.kernels.attention              the quick set, under two minutes on an H200
    python -m benchmarks.kernels.attention --full       every length, block size and density
    python -m benchmarks.kernels.attention --small      three tiny cases, for a CPU

Every provider is checked against float64 before it is timed, and all run in one process. TFLOP/s
count the kept blocks of sparse providers and all blocks of dense ones. The floor is what the kept
blocks' products alone would take at the rate of a large matrix product, measured in the same run.
Dense attention does not depend on the pattern: it is timed once for each shape and length. What has
to compile for every shape (FlexAttention) comes last, so that a time budget cuts that alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn.attention import SDPBackend

from benchmarks.kernels import dense_providers, sparse_providers
from benchmarks.kernels.cases import FULL, QUICK, SMALL, Case, unique
from benchmarks.kernels.dense_providers import Run
from benchmarks.kernels.inputs import Inputs, verify
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.measuring.timing import synchronize, time_calls

FILE: Final = "attention.csv"
COLUMNS: Final = (
    *("case", "shape", "num_heads", "num_kv_heads", "head_dim", "dtype", "lengths", "batch"),
    *("tokens", "block_size", "select", "density", "provider", "kind", "ms_p20", "ms", "ms_p80"),
    *("tflops", "error", "prepare_s", "note"),
)
QUICK_BUDGET: Final = 100.0
"""Seconds after which the quick set prepares no provider any more that compiles for each shape."""

FLOOR: Final = "floor (matrix product)"


def _needs_cuda(case: Case, device: str) -> str:
    return "" if device == "cuda" else "needs a CUDA device"


def _half_on_cuda(case: Case, device: str) -> str:
    if case.dtype == torch.float32 and device == "cuda":
        return "not in float32"
    return _needs_cuda(case, device)


def _cudnn(case: Case, device: str) -> str:
    return _half_on_cuda(case, device) or ("" if case.head_dim <= 128 else "head_dim above 128")


def _flash_attention_4(case: Case, device: str) -> str:
    problem = _half_on_cuda(case, device)
    if not problem and torch.cuda.get_device_capability()[0] < 9:
        problem = "needs compute capability 9.0"
    if not problem and (case.block_size != 128 or case.head_dim != 128):
        problem = "its tiles need blocks of 128 and head_dim 128"
    return problem


def _flex(case: Case, device: str) -> str:
    if device == "cuda" and case.dtype == torch.float32:
        return "not in float32"
    return ""


def _flex_full_blocks(case: Case, device: str) -> str:
    if device == "cpu":
        return "not compiled it ignores lists of full blocks"
    return _flex(case, device) or ("blocks below its tiles" if case.block_size < 32 else "")


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to attend.

    Attributes:
        make: prepares inputs and returns what is timed.
        sparse: whether it leaves out the blocks that are not kept.
        refusal: why it does not serve a case on a device, "" where it does.
        compiles: whether it compiles for every shape, which takes seconds.
    """

    make: Callable[[Inputs], Run]
    sparse: bool
    refusal: Callable[[Case, str], str] = lambda case, device: ""
    compiles: bool = False


PROVIDERS: Final = {
    "ours": Provider(sparse_providers.ours, sparse=True),
    "FlashAttention 3, dense": Provider(dense_providers.flash_attention_3, False, _half_on_cuda),
    "FlashAttention 4, block-sparse": Provider(
        sparse_providers.flash_attention_4, True, _flash_attention_4
    ),
    "FlashAttention 2, dense": Provider(
        dense_providers.sdpa(SDPBackend.FLASH_ATTENTION), False, _half_on_cuda
    ),
    "cuDNN, dense": Provider(dense_providers.sdpa(SDPBackend.CUDNN_ATTENTION), False, _cudnn),
    "xformers, dense": Provider(dense_providers.xformers_attention, False, _needs_cuda),
    "PyTorch on CPU, dense": Provider(
        dense_providers.sdpa(None), False, lambda case, device: "CPU only" * (device == "cuda")
    ),
    "FlexAttention, as released": Provider(
        sparse_providers.flex_attention_as_released, True, _flex, compiles=True
    ),
    "FlexAttention, full blocks": Provider(
        sparse_providers.flex_attention_full_blocks, True, _flex_full_blocks, compiles=True
    ),
}
"""In the order of the table."""


class Runner:
    """Measures providers on cases, one row each."""

    def __init__(self, device: str, repetition_ms: float, budget_s: float = 0.0) -> None:
        """Start the clock.

        Args:
            device: "cuda" or "cpu".
            repetition_ms: time to spend on the repetitions of one provider.
            budget_s: after so many seconds providers that compile are skipped; 0: never.
        """
        self.device = device
        self.repetition_ms = repetition_ms
        self.budget_s = budget_s
        self._started = time.perf_counter()
        self._dense_done: set[tuple[object, ...]] = set()

    def rows(self, cases: Sequence[Case], providers: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows; those of providers that compile for every shape after all others."""
        rate = matrix_product_rate(self.device)
        for compiles in (False, True):
            names = [name for name in providers if PROVIDERS[name].compiles == compiles]
            ordered = sorted(cases, key=_importance) if compiles else cases
            for case in ordered if names else ():
                torch.manual_seed(0)
                x = Inputs.random(case, self.device)
                if not compiles:
                    yield self._floor(x, rate)
                for name in names:
                    if not PROVIDERS[name].sparse and (name, *case.dense_key) in self._dense_done:
                        continue
                    self._dense_done.add((name, *case.dense_key))
                    yield self.measure(x, name)
                del x
                if self.device == "cuda":
                    torch.cuda.empty_cache()

    def measure(self, x: Inputs, name: str) -> dict[str, Any]:
        """Check one provider and time it; its note says why there is no time."""
        provider = PROVIDERS[name]
        density = x.density if provider.sparse else 1.0
        row = describe(x.case) | {
            "provider": name,
            "kind": "sparse" if provider.sparse else "dense",
            "density": density,
        }
        refusal = provider.refusal(x.case, self.device)
        elapsed = time.perf_counter() - self._started
        if not refusal and provider.compiles and 0 < self.budget_s < elapsed:
            refusal = f"skipped: the time budget of {self.budget_s:.0f} s is used up"
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

    def _floor(self, x: Inputs, rate: float) -> dict[str, Any]:
        return describe(x.case) | {
            "provider": FLOOR,
            "kind": "floor",
            "density": x.density,
            "ms": x.flops(x.density) / rate * 1e3,
            "tflops": rate / 1e12,
            "note": "computed: kept FLOPs at the measured rate of a large matrix product",
        }


def _importance(case: Case) -> tuple[bool, bool, bool, int]:
    """Sort key of cases whose providers compile: what a budget should leave out comes last."""
    return (case.block_size != 128, case.shape != "llada", len(case.lengths) > 1, -case.num_tokens)


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
    rate = f"{row['tflops']:.0f}" if "tflops" in row else "-"
    note = "" if row["kind"] == "floor" else row.get("note", "")
    return (
        f"{row['case']:24} {row['provider']:31} {row['density']:7.4f} "
        f"{times[0]:>9} {times[1]:>9} {times[2]:>9} {rate:>8} {note}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true", help="every length, block and density")
    which.add_argument("--small", action="store_true", help="three tiny cases, for a CPU")
    parser.add_argument("--cases", nargs="+", default=[], help="only cases whose label holds this")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--repetition-ms", type=float, default=None, help="per provider and case")
    parser.add_argument("--budget", type=float, default=None, help="seconds; 0: no limit")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what is there")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    options = parser.parse_args(arguments)

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not options.small:
        parser.error("only --small runs on a CPU")
    cases = unique(SMALL if options.small else FULL if options.full else QUICK)
    if options.cases:
        cases = [case for case in cases if any(part in case.label for part in options.cases)]
    if not cases:
        parser.error(f"--cases {' '.join(options.cases)}: no case has such a label")
    budget = 0.0 if options.full else QUICK_BUDGET
    repetition = 5.0 if options.small else 100.0
    runner = Runner(
        device,
        repetition if options.repetition_ms is None else options.repetition_ms,
        budget if options.budget is None else options.budget,
    )
    started = time.perf_counter()
    print(headline())
    print(
        f"{'case':24} {'provider':31} {'density':>7} {'p20 ms':>9} {'median ms':>9} "
        f"{'p80 ms':>9} {'TFLOP/s':>8}"
    )
    file = RowFile(options.output / FILE, COLUMNS)
    for row in runner.rows(cases, options.providers):
        file.add(row)
        print(line(row), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; rows in {file.path}")


if __name__ == "__main__":
    main()
