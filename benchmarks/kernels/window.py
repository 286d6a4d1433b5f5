"""Speed of attention from a window of few rows to all stored keys, dense and by lists.

    python -m benchmarks.kernels.window               heads of LLaDA-8B and Dream-7B, 1.3k to 64k
    python -m benchmarks.kernels.window --small       tiny cases, for a CPU
    python -m benchmarks.kernels.window --keys 65536  some lengths only

One layer, one sequence, as a pass of a canvas in blocks of 32 with a margin of 16 rows has it: 64
rows near the end of the sequence, in one query block of the pattern or across the border of two.
Every provider is checked against float64 before it is timed. On CUDA a call is timed as a CUDA
graph, as it is served. GB/s count what has to be read once: every stored block that any row and
head keeps. The floor is the time of those bytes at the rate of a large copy, measured in the same
run (bytes read and written).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import SHAPES
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.measuring.timing import synchronize, time_calls
from vllm_sparsed.kernels.window_attention import Window, WindowTiles, window_attention

FILE: Final = "window.csv"
COLUMNS: Final = (
    *("case", "shape", "keys", "rows", "select", "query_blocks", "pages", "provider"),
    *("us_p20", "us", "us_p80", "gb_per_s", "error", "note"),
)
PAGE_SIZE: Final = 128
NUM_ROWS: Final = 64
FLOOR: Final = "floor (copy)"
FP8: Final = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class WindowCase:
    """One window.

    Attributes:
        shape: a key of SHAPES.
        keys: tokens of the sequence.
        select: share of the key blocks on each list; None: dense.
        query_blocks: 1 or 2, how many query blocks the window touches.
        fp8: whether the store is in fp8.
    """

    shape: str
    keys: int
    select: float | None = None
    query_blocks: int = 2
    fp8: bool = False

    @property
    def label(self) -> str:
        length = f"{self.keys / 1024:.3g}k"
        how = "dense" if self.select is None else f"{self.select:.0%}-{self.query_blocks}"
        return "-".join([self.shape, length, how, *(["fp8"] if self.fp8 else [])])

    @property
    def head_dim(self) -> int:
        return 32 if self.shape == "tiny" else 128

    @property
    def first_position(self) -> int:
        """16 rows before a border of blocks, or in the middle of one block."""
        border = (self.keys // PAGE_SIZE - 1) * PAGE_SIZE
        return border - 16 if self.query_blocks == 2 else border - 96


def cases_of(shape: str, keys: int) -> list[WindowCase]:
    """Dense, by lists of 30% (one query block, two), and the same in fp8."""
    return [
        WindowCase(shape, keys, select, query_blocks, fp8)
        for fp8 in (False, True)
        for select, query_blocks in ((None, 2), (0.3, 1), (0.3, 2))
    ]


KEYS: Final = (1280, 4096, 16384, 65536)
USUAL: Final = tuple(
    case
    for keys in reversed(KEYS)
    for shape in ("llada", "dream")
    for case in cases_of(shape, keys)
)
SMALL: Final = tuple(case for keys in (300, 700) for case in cases_of("tiny", keys))


@dataclass(frozen=True)
class Inputs:
    """The store of one layer, one window's queries and its lists."""

    case: WindowCase
    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    window: Window
    indices: Tensor
    counts: Tensor
    one: Tensor

    @classmethod
    def random(cls, case: WindowCase, device: str) -> Inputs:
        """Normal values, pages in random order; lists drawn evenly."""
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        num_heads, num_kv_heads = SHAPES[case.shape]
        num_pages = -(-case.keys // PAGE_SIZE)
        store = torch.randn(
            (num_pages, num_kv_heads, PAGE_SIZE, 2 * case.head_dim), device=device, dtype=dtype
        )
        if case.fp8:
            store = store.to(FP8)
        k_pages, v_pages = store.transpose(1, 2).split(case.head_dim, dim=-1)
        kept = max(1, round((case.select or 1.0) * num_pages))
        order = torch.rand(2, num_heads, num_pages, device=device).argsort(dim=-1)
        return cls(
            case=case,
            q=torch.randn(NUM_ROWS, num_heads, case.head_dim, device=device, dtype=dtype),
            k_pages=k_pages,
            v_pages=v_pages,
            block_table=torch.randperm(num_pages, device=device)[None].int(),
            window=Window(
                0,
                NUM_ROWS,
                case.first_position,
                case.keys,
                0,
                () if case.select is None else range(case.query_blocks),
                kept,
            ),
            indices=order[..., :kept].sort(dim=-1).values.short(),
            counts=torch.full((2, num_heads), kept, dtype=torch.int32, device=device),
            one=torch.ones(1, device=device),
        )

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[2]

    def stored(self, pages: Tensor, dtype: torch.dtype) -> Tensor:
        """[num_kv_heads, keys, head_dim] in the order of the sequence."""
        in_order = pages.to(dtype)[self.block_table[0].long()]
        return in_order.flatten(0, 1)[: self.case.keys].transpose(0, 1).contiguous()

    @cached_property
    def kept(self) -> Tensor:
        """bool [query blocks, num_heads, key blocks]."""
        num_blocks = self.block_table.shape[1]
        shape = (self.case.query_blocks, self.q.shape[1], num_blocks)
        kept = torch.ones(shape, dtype=torch.bool, device=self.q.device)
        if self.case.select is not None:
            kept = torch.zeros_like(kept)
            kept.scatter_(2, self.indices[: self.case.query_blocks].long(), True)
            first = self.case.first_position // PAGE_SIZE
            kept[..., first : first + self.case.query_blocks] = True
        return kept

    @cached_property
    def num_bytes(self) -> int:
        """Stored keys and values that any row and head keeps."""
        of_head = self.kept.any(dim=0).unflatten(0, (self.num_kv_heads, -1)).any(dim=1)
        per_block = 2 * PAGE_SIZE * self.case.head_dim * self.k_pages.element_size()
        return int(of_head.sum()) * per_block

    @cached_property
    def exact(self) -> Tensor:
        """Float64 [rows, num_heads, head_dim]."""
        k, v = (self.stored(x, torch.float64) for x in (self.k_pages, self.v_pages))
        positions = torch.arange(NUM_ROWS) + self.case.first_position
        query_block = positions // PAGE_SIZE - self.case.first_position // PAGE_SIZE
        if self.case.select is None:
            query_block = torch.zeros_like(query_block)
        out = torch.empty(self.q.shape, dtype=torch.float64, device=self.q.device)
        for head in range(self.q.shape[1]):
            kv_head = head * self.num_kv_heads // self.q.shape[1]
            scores = self.q[:, head].double() @ k[kv_head].T * self.scale
            mask = self.kept[query_block.to(scores.device), head]
            mask = mask.repeat_interleave(PAGE_SIZE, dim=1)[:, : self.case.keys]
            out[:, head] = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ v[kv_head]
        return out


Run = Callable[[], Tensor]


def ours(x: Inputs) -> Run:
    """The kernel, or on a CPU the PyTorch path."""
    num_heads = x.q.shape[1]
    tiles = WindowTiles.build([x.window], PAGE_SIZE, num_heads, x.q.device)
    out = torch.empty_like(x.q)
    scale = x.one if x.case.fp8 else None

    def run() -> Tensor:
        return window_attention(
            x.q,
            x.k_pages,
            x.v_pages,
            x.block_table,
            tiles,
            indices=x.indices,
            counts=x.counts,
            scale=x.scale,
            k_scale=scale,
            v_scale=scale,
            out=out,
        )

    return run


def flash_attention(x: Inputs) -> Run:
    """vLLM's with a block table, all keys."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    version = get_flash_attn_version(head_size=x.case.head_dim)
    bounds = torch.tensor([0, NUM_ROWS], dtype=torch.int32, device=x.q.device)
    length = torch.tensor([x.case.keys], dtype=torch.int32, device=x.q.device)

    def run() -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            x.q,
            x.k_pages,
            x.v_pages,
            max_seqlen_q=NUM_ROWS,
            cu_seqlens_q=bounds,
            max_seqlen_k=x.case.keys,
            seqused_k=length,
            block_table=x.block_table,
            softmax_scale=x.scale,
            causal=False,
            fa_version=version,
        )
        return out

    return run


def sdpa(x: Inputs) -> Run:
    """PyTorch's on keys that lie side by side already."""
    k, v = (x.stored(pages, x.q.dtype)[None] for pages in (x.k_pages, x.v_pages))
    q = x.q.transpose(0, 1)[None].contiguous()
    grouped = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=x.scale, enable_gqa=grouped)
        return out[0].transpose(0, 1)

    return run


OURS: Final = "ours"
FLASH: Final = "FlashAttention with a block table"
SDPA: Final = "PyTorch, contiguous keys"
PROVIDERS: Final = {OURS: ours, FLASH: flash_attention, SDPA: sdpa}


def refusal(name: str, case: WindowCase, device: str) -> str:
    """Why a provider does not serve a case, "" where it does."""
    if name == OURS:
        return ""
    if case.select is not None:
        return "dense only"
    if name == SDPA:
        return "not with fp8 keys" if case.fp8 else ""
    if device == "cpu":
        return "needs a CUDA device"
    if case.fp8:
        return "wants queries in fp8"
    try:
        importlib.import_module("vllm.vllm_flash_attn")
    except Exception as problem:
        # Packages fail to import in many ways: what they say is what the table tells.
        return f"cannot be imported: {reason(problem)}"
    return ""


class WrongResultError(RuntimeError):
    """A provider's output is further from float64 than rounding explains."""


def verify(out: Tensor, x: Inputs) -> float:
    """Largest absolute error of an output.

    Raises:
        WrongResultError: it is too large, or not a number.
    """
    error = (out.double() - x.exact).abs().max().item()
    roundings = 32 if x.q.dtype == torch.float32 else 4
    allowed = roundings * torch.finfo(x.q.dtype).eps * x.exact.abs().max().item()
    if not error <= allowed:
        raise WrongResultError(f"wrong result: error {error:.2e}, allowed {allowed:.2e}")
    return error


def in_graph(run: Run, device: str) -> Callable[[], object]:
    """What is timed: on CUDA a graph of one call, which has been made before."""
    if device == "cpu":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_rate(device: str) -> float:
    """Bytes per second that a large copy reads and writes."""
    x = torch.empty(2**28 if device == "cuda" else 2**22, dtype=torch.float32, device=device)
    out = torch.empty_like(x.uniform_())
    out.copy_(x)
    ms = time_calls(lambda: out.copy_(x), device, 200.0 if device == "cuda" else 20.0)
    return 2 * x.nbytes / ms.p50 * 1e3


def measure(x: Inputs, name: str, device: str, budget_ms: float) -> dict[str, Any]:
    """Check one provider and time it; its note says why there is no time."""
    row = describe(x.case) | {"provider": name}
    refused = refusal(name, x.case, device)
    if refused:
        return row | {"note": refused}
    try:
        run = PROVIDERS[name](x)
        error = verify(run(), x)
        ms = time_calls(in_graph(run, device), device, budget_ms)
    except Exception as problem:
        # A device error stays: no later figure could be trusted.
        synchronize(device)
        return row | {"note": reason(problem)}
    times = {"us_p20": ms.p20 * 1e3, "us": ms.p50 * 1e3, "us_p80": ms.p80 * 1e3}
    return row | times | {"gb_per_s": x.num_bytes / ms.p50 / 1e6, "error": error}


def rows(cases: Sequence[WindowCase], device: str, budget_ms: float) -> Iterator[dict[str, Any]]:
    """All rows, each case's floor first."""
    rate = copy_rate(device)
    for case in cases:
        torch.manual_seed(0)
        x = Inputs.random(case, device)
        yield describe(case) | {
            "provider": FLOOR,
            "us": x.num_bytes / rate * 1e6,
            "gb_per_s": rate / 1e9,
            "note": "computed: kept bytes at the measured rate of a copy",
        }
        for name in PROVIDERS:
            yield measure(x, name, device, budget_ms)


def describe(case: WindowCase) -> dict[str, Any]:
    """The columns that say what was run."""
    return {
        "case": case.label,
        "shape": case.shape,
        "keys": case.keys,
        "rows": NUM_ROWS,
        "select": "dense" if case.select is None else case.select,
        "query_blocks": case.query_blocks,
        "pages": "fp8" if case.fp8 else "as q",
    }


def line(row: dict[str, Any]) -> str:
    """One row as a line of the printed table."""
    times = [f"{row[name]:.1f}" if name in row else "-" for name in ("us_p20", "us", "us_p80")]
    rate = f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "-"
    return (
        f"{row['case']:24} {row['provider']:34} {times[0]:>9} {times[1]:>9} {times[2]:>9} "
        f"{rate:>7} {row.get('note', '')}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny cases, for a CPU")
    parser.add_argument("--keys", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: what is there")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and not options.small:
        parser.error("only --small runs on a CPU")
    cases = SMALL if options.small else USUAL
    if options.keys:
        cases = tuple(case for case in cases if case.keys in options.keys)
        if not cases:
            parser.error(f"--keys {' '.join(map(str, options.keys))}: no case is so long")
    file = RowFile(options.output / FILE, COLUMNS)
    print(headline())
    print(f"{'case':24} {'provider':34} {'p20 us':>9} {'median us':>9} {'p80 us':>9} {'GB/s':>7}")
    for row in rows(cases, device, 5.0 if options.small else 50.0):
        file.add(row)
        print(line(row), flush=True)
    print(f"rows in {file.path}")


if __name__ == "__main__":
    main()
