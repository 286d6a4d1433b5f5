"""Measures for which requests FlashAttention 4 is faster than this package's kernel.

    python -m benchmarks.kernels.flash_attention_4

Both run as the engine calls them: ours over all requests of a batch at once, FlashAttention 4
request by request, its index lists gathered from the pattern store in each call. Both are checked
against float64 before they are timed, in turns. Prints a table and the entries of FLASH_ATTENTION_4
in vllm_sparsed/planning/kernel_costs.py: the longest run of lengths at which it is faster with
every share of the blocks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.kernels.cases import MIXED, Case
from benchmarks.kernels.cost_fit import Measured, fit_kernel
from benchmarks.kernels.inputs import Inputs, verify
from benchmarks.kernels.sparse_providers import ours
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.environment import headline
from benchmarks.measuring.timing import time_calls
from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4
from vllm_sparsed.planning.crossover import FlashAttention4Range

LENGTHS: Final = (4096, 8192, 16384, 32768, 65536)
SELECTS: Final = (0.3, 0.5)
ROUNDS: Final = 3
GAIN: Final = 1.02
"""By this factor it has to be faster: less is within what two runs differ by."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both kernels on one case.

    Attributes:
        case: one request or a batch.
        flops: of the kept blocks' products.
        ours_ms, theirs_ms: medians; `theirs_ms` with its lists.
        lists_ms: of gathering the lists alone.
    """

    case: Case
    flops: float
    ours_ms: float
    theirs_ms: float
    lists_ms: float

    @property
    def faster(self) -> bool:
        return self.ours_ms > GAIN * self.theirs_ms

    @property
    def measured(self) -> Measured:
        """Their time, as the fit of the costs takes it."""
        case = self.case
        rows = float(case.num_tokens * case.num_heads)
        return Measured("sparse", 128, case.num_tokens, self.theirs_ms, rows, self.flops)

    def line(self) -> str:
        rates = [self.flops / ms / 1e9 for ms in (self.ours_ms, self.theirs_ms)]
        return (
            f"{self.case.label:22} {self.ours_ms:8.3f} {self.theirs_ms:8.3f} "
            f"{self.lists_ms * 1e3:6.1f} {rates[0]:5.0f} {rates[1]:5.0f} "
            f"{self.ours_ms / self.theirs_ms:6.3f}"
        )


def request_by_request(x: Inputs) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """FlashAttention 4 over a batch as the engine runs it, and the gathering of its lists alone."""
    slots, first = [], 0
    for length in x.case.lengths:
        last = first + length // x.case.block_size
        slots.append(torch.arange(first, last, dtype=torch.int32, device=x.q.device))
        first = last
    out = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)

    def attend() -> Tensor:
        for span, rows in zip(x.spans, slots, strict=True):
            flash_attention_4.flash_attention_4(
                x.q[span],
                x.k[span],
                x.v[span],
                x.indices,
                x.counts,
                rows,
                scale=x.scale,
                out=out[span],
            )
        return out

    def gather() -> None:
        for rows in slots:
            flash_attention_4.gather_lists(x.indices, x.counts, rows)

    return attend, gather


def compare(case: Case, device: str, budget_ms: float) -> Comparison:
    """Check both kernels, then time them in turns.

    Raises:
        WrongResultError: one of them is further from float64 than rounding explains.
    """
    torch.manual_seed(0)
    x = Inputs.random(case, device)
    own = ours(x)
    theirs, gather = request_by_request(x)
    for run in (own, theirs):
        verify(run(), x, sparse=True)
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for i, run in enumerate((own, theirs)):
            times[i].append(time_calls(run, device, budget_ms / ROUNDS).p50)
    lists = time_calls(gather, device, budget_ms / ROUNDS).p50
    own_ms, their_ms = (statistics.median(ms) for ms in times)
    return Comparison(case, x.flops(x.density), own_ms, their_ms, lists)


def entries(comparisons: Sequence[Comparison]) -> Iterator[tuple[int, FlashAttention4Range]]:
    """For each number of query heads per key head the requests to give to FlashAttention 4."""
    by_ratio: dict[int, dict[int, list[Comparison]]] = {}
    for comparison in comparisons:
        case = comparison.case
        if len(case.lengths) == 1:
            by_length = by_ratio.setdefault(case.num_heads // case.num_kv_heads, {})
            by_length.setdefault(case.num_tokens, []).append(comparison)
    for ratio, by_length in by_ratio.items():
        longest: list[int] = []
        run: list[int] = []
        for length in sorted(by_length):
            run = [*run, length] if all(c.faster for c in by_length[length]) else []
            longest = max(longest, run, key=len)
        if longest:
            cost = fit_kernel([c.measured for length in longest for c in by_length[length]])
            yield ratio, FlashAttention4Range(cost, 128, longest[0], longest[-1])


def source(ratio: int, fa4: FlashAttention4Range) -> str:
    """The entry of kernel_costs.py."""
    cost = f"KernelCost({fa4.cost.launch_us}, {fa4.cost.row_ns}, {fa4.cost.rate})"
    span = f"{fa4.min_tokens}, {fa4.max_tokens}"
    return f"((9, 0), 128, {ratio}): FlashAttention4Range({cost}, {fa4.block_size}, {span}),"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="multiples of 128")
    parser.add_argument("--selects", type=float, nargs="+", default=SELECTS, help="shares kept")
    parser.add_argument("--shapes", nargs="+", default=("llada", "dream"))
    parser.add_argument("--mixed", action="store_true", help="a batch of six lengths, too")
    parser.add_argument("--repetition-ms", type=float, default=300.0, help="per kernel and case")
    parser.add_argument("--minutes", type=float, help="measure nothing more after so many")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device of compute capability 9.0")
    if not flash_attention_4.installed():
        parser.error("FlashAttention 4 is not installed (nvidia-cutlass-dsl, quack-kernels)")
    started, deadline = time.perf_counter(), Deadline(options.minutes)
    print(headline())
    print(f"{'case':22} {'ours ms':>8} {'FA4 ms':>8} {'lists':>6} {'TFLOP/s':>11} {'gain':>6}")
    batches = [(length,) for length in options.lengths] + ([MIXED] if options.mixed else [])
    cases = [
        Case(shape, tuple(lengths), select=select)
        for lengths in batches
        for shape in options.shapes
        for select in options.selects
    ]
    comparisons = []
    for case in cases:
        if deadline.passed:
            print(f"{case.label}: {deadline.note}")
            continue
        comparisons.append(compare(case, "cuda", options.repetition_ms))
        print(comparisons[-1].line(), flush=True)
        torch.cuda.empty_cache()
    for ratio, fa4 in entries(comparisons):
        print(source(ratio, fa4))
    print(f"{time.perf_counter() - started:.0f} s; lists in microseconds")


if __name__ == "__main__":
    main()
