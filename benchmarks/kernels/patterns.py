"""Time to build the SparseD patterns of one layer, beside plain PyTorch and one dense attention.

    python -m benchmarks.kernels.patterns                the usual cases, in order of importance
    python -m benchmarks.kernels.patterns --small        two tiny cases, for a CPU
    python -m benchmarks.kernels.patterns --minutes 1 --lengths 16384 65536 --resume

Ours is checked against the full softmax at a short length before it is timed. It gets the
log-sum-exp that the dense step returns anyway, but for the cases marked "nolse". TFLOP/s count one
q k^T. The dense attention, which the building step runs too, is there for scale.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.kernels.pattern_inputs import (
    SMALL,
    USUAL,
    Layer,
    PatternCase,
    straightforward,
    verify,
)
from benchmarks.kernels.providers import PROVIDERS as ATTENTION
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.measuring.timing import synchronize, time_calls
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests.plain_loop import block_pattern

FILE: Final = "patterns.csv"
COLUMNS: Final = (
    *("case", "shape", "num_heads", "num_kv_heads", "head_dim", "dtype", "length", "block_size"),
    *("canvas", "select", "lse", "density", "provider", "ms_p20", "ms", "ms_p80", "tflops"),
    *("peak_mib", "note"),
)
OURS: Final = "ours"
PLAIN: Final = "PyTorch, one head at a time"
PLAIN_ROWS: Final = "PyTorch, float32, some rows at a time"
DENSE: Final = "dense attention, for scale"
PROVIDERS: Final = (OURS, DENSE, PLAIN, PLAIN_ROWS)

LONGEST_PLAIN: Final = {PLAIN: 65536, PLAIN_ROWS: 32768}
"""Tokens up to which plain PyTorch is tried: one head takes several L x L matrices, and seconds."""


def dense_attention(device: str) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Dense attention with its log-sum-exp: FlashAttention 3 where it is there, else PyTorch's."""
    if ATTENTION["FlashAttention 3, dense"].absent(device):
        return _pytorch_attention

    from vllm.vllm_flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
        result: tuple[Tensor, Tensor] = flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=len(q),
            cu_seqlens_q=bounds,
            max_seqlen_k=len(q),
            cu_seqlens_k=bounds,
            softmax_scale=q.shape[2] ** -0.5,
            fa_version=3,
            return_softmax_lse=True,
        )
        return result

    return attend


def _pytorch_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[L, heads, D] and float32 [heads, L], by PyTorch's kernel for the device."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (
        x.repeat_interleave(n, 1).transpose(0, 1)[None]
        for x, n in ((q, 1), (k, repeats), (v, repeats))
    )
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out[0].transpose(0, 1), lse[0].float().contiguous()


class Runner:
    """Measures providers on cases, one row each."""

    def __init__(
        self, device: str, deadline: Deadline | None = None, done: RowFile | None = None
    ) -> None:
        """Prepare.

        Args:
            device: "cuda" or "cpu".
            deadline: after it nothing is measured any more.
            done: rows that need not be measured again.
        """
        self.device = device
        self.deadline = deadline or Deadline()
        self._done = done
        self._dense = dense_attention(device)

    def rows(self, cases: Sequence[PatternCase]) -> Iterator[dict[str, Any]]:
        """One for each case and provider."""
        for case in cases:
            wanted = [name for name in PROVIDERS if self._is_wanted(case, name)]
            if not wanted:
                continue
            if self.deadline.passed:
                yield from (self.describe(case, name, self.deadline.note) for name in wanted)
                continue
            torch.manual_seed(0)
            try:
                layer = Layer.random(case, self.device, self._dense)
            except Exception as problem:
                synchronize(self.device)
                yield from (self.describe(case, name, reason(problem)) for name in wanted)
                continue
            for name in wanted:
                yield self.measure(case, layer, name)
            del layer
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def _is_wanted(self, case: PatternCase, name: str) -> bool:
        if case.length > LONGEST_PLAIN.get(name, case.length):
            return False
        # Peers depend neither on the log-sum-exp nor, the dense one, on blocks: told once.
        usual = case.lse_given and case.block_size == 128
        if name != OURS and not (usual or case.shape == "tiny"):
            return False
        return self._done is None or not self._done.holds("ms", case=case.label, provider=name)

    def measure(self, case: PatternCase, layer: Layer, name: str) -> dict[str, Any]:
        """Check and time one provider; its note says why there is no time."""
        row = self.describe(case, name)
        run = self._call(case, layer, name)
        cuda = self.device == "cuda"
        try:
            if name == OURS:
                verify(case, self.device)
            run()
            if cuda:
                synchronize(self.device)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                synchronize(self.device)
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            ms = time_calls(run, self.device, 100.0 if cuda else 5.0)
        except Exception as problem:
            # A device error stays: no later figure could be trusted.
            synchronize(self.device)
            return row | {"note": reason(problem)}
        if name == OURS:
            row["density"] = layer.density(case)
        if name != DENSE:
            products = 2 * case.length**2 * case.num_heads * case.head_dim
            row["tflops"] = products / ms.p50 * 1e-9
        return row | {"ms_p20": ms.p20, "ms": ms.p50, "ms_p80": ms.p80}

    def _call(self, case: PatternCase, layer: Layer, name: str) -> Callable[[], object]:
        if name == OURS:
            return lambda: layer.build(case)
        if name == DENSE:
            return lambda: self._dense(layer.q, layer.k, layer.v)
        if name == PLAIN:
            return lambda: straightforward(layer, case)
        settings = SparseSettings(skip=0.2, select=case.select, block_size=case.block_size)
        q, k = layer.q.transpose(0, 1), layer.k.transpose(0, 1)
        return lambda: block_pattern(q, k, case.canvas, settings)

    def describe(self, case: PatternCase, name: str, note: str = "") -> dict[str, Any]:
        """The columns that say what was run."""
        return {
            "case": case.label,
            "shape": case.shape,
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "dtype": "bfloat16" if self.device == "cuda" else "float32",
            "length": case.length,
            "block_size": case.block_size,
            "canvas": case.canvas,
            "select": case.select,
            "lse": "given" if case.lse_given else "computed",
            "provider": name,
            "note": note,
        }


def line(row: dict[str, Any]) -> str:
    """One row as a line of the printed table."""
    ms = f"{row['ms']:.3f}" if "ms" in row else "-"
    rate = f"{row['tflops']:.0f}" if "tflops" in row else "-"
    peak = f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-"
    density = f"{row['density']:.4f}" if "density" in row else "-"
    return (
        f"{row['case']:30} {row['provider']:38} {density:>7} {ms:>10} {rate:>8} {peak:>9} "
        f"{row['note']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two tiny cases, for a CPU")
    parser.add_argument("--lengths", type=int, nargs="+", help="only requests so long")
    parser.add_argument("--minutes", type=float, help="measure nothing more after so many")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what is there")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    parser.add_argument(
        "--resume", action="store_true", help="keep the folder's rows, measure what they lack"
    )
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not options.small:
        parser.error("only --small runs on a CPU")
    cases = [
        case
        for case in (SMALL if options.small else USUAL)
        if not options.lengths or case.length in options.lengths
    ]
    if not cases:
        parser.error(f"--lengths {' '.join(map(str, options.lengths))}: no case is so long")
    started = time.perf_counter()
    print(headline())
    print(
        f"{'case':30} {'provider':38} {'density':>7} {'median ms':>10} {'TFLOP/s':>8} "
        f"{'peak MiB':>9}"
    )
    file = RowFile(options.output / FILE, COLUMNS, append=options.resume)
    runner = Runner(device, Deadline(options.minutes), file if options.resume else None)
    for row in runner.rows(cases):
        file.add(row)
        print(line(row), flush=True)
    print(f"{time.perf_counter() - started:.0f} s; rows in {file.path}")


if __name__ == "__main__":
    main()
