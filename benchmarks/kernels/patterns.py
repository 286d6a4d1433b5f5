"""Time to build the SparseD patterns of one layer, beside one dense attention of the same layer.

    python benchmarks/kernels/patterns.py [--csv FILE]

Each row is checked against the full softmax at a short length first. The log-sum-exp that the dense
step returns anyway is given to `build_pattern`, but for the rows marked "no lse".
"""

import argparse
import csv
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import triton
from torch import Tensor

from vllm_sparsed.kernels.block_importance import block_importance
from vllm_sparsed.kernels.block_importance.reference import block_importance_reference
from vllm_sparsed.kernels.block_selection import kept_columns, select_blocks
from vllm_sparsed.kernels.block_selection.torch_path import select_blocks_torch
from vllm_sparsed.kernels.pattern_building import (
    build_pattern,
    generation_start_block,
    kept_blocks_bound,
)

CHECKED_LENGTH: Final = 2000
# Largest error of the importance, relative to its largest value, that passes the check.
ALLOWED_ERROR: Final = 1e-5
WIDTHS: Final = {"case": 34}


@dataclass(frozen=True, slots=True)
class Case:
    """One layer of one request."""

    length: int
    block_size: int = 128
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    canvas: int = 1024
    select: float = 0.3
    lse_given: bool = True

    @property
    def label(self) -> str:
        return (
            f"{self.length // 1024}k b{self.block_size} h{self.num_heads}/{self.num_kv_heads} "
            f"d{self.head_dim} G{self.canvas}{'' if self.lse_given else ' no lse'}"
        )


CASES: Final = (
    Case(4096),
    Case(16384),
    Case(16384, canvas=8192),
    Case(16384, canvas=16384),
    Case(16384, lse_given=False),
    Case(16384, block_size=64),
    Case(16384, block_size=32),
    Case(16384, num_heads=28, num_kv_heads=4),
    Case(16384, head_dim=64),
    Case(65536),
    Case(65536, canvas=8192),
    Case(65536, lse_given=False),
    Case(65536, block_size=64),
    Case(65536, block_size=32),
    Case(131072, block_size=128),
    Case(131072, block_size=32, canvas=8192),
)


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of one layer and the store its pattern goes to."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor | None
    slots: Tensor
    indices: Tensor
    counts: Tensor

    def build(self, case: Case) -> None:
        build_pattern(
            self.q,
            self.k,
            canvas_len=case.canvas,
            block_size=case.block_size,
            select=case.select,
            scale=case.head_dim**-0.5,
            lse=self.lse,
            row_slots=self.slots,
            indices=self.indices,
            counts=self.counts,
        )


def dense_attention() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """vLLM's FlashAttention 3 with its log-sum-exp, where it is installed and the chip has it."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    if torch.cuda.get_device_capability() != (9, 0):
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=q.device)
        return flash_attn_varlen_func(
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

    return attend


def make_layer(case: Case) -> Layer:
    torch.manual_seed(0)
    sizes = [case.num_heads * case.head_dim] + [case.num_kv_heads * case.head_dim] * 2
    qkv = torch.randn((case.length, sum(sizes)), dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.view(case.length, -1, case.head_dim) for x in qkv.split(sizes, dim=1))
    lse = None
    if case.lse_given:
        dense = dense_attention()
        if dense is not None:
            lse = dense(q, k, v)[1]
        else:
            # Scores of unit variance: log of the sum of so many log-normal numbers, nearly.
            lse = torch.full((case.num_heads, case.length), 0.5 + math.log(case.length)).cuda()
    num_blocks = -(-case.length // case.block_size)
    first = generation_start_block(case.length, case.canvas, case.block_size)
    width = kept_blocks_bound(num_blocks, num_blocks - first, case.select)
    return Layer(
        q,
        k,
        v,
        lse,
        torch.randperm(num_blocks, dtype=torch.int32, device="cuda"),
        torch.empty((num_blocks, case.num_heads, width), dtype=torch.int16, device="cuda"),
        torch.empty((num_blocks, case.num_heads), dtype=torch.int32, device="cuda"),
    )


def verify(case: Case) -> None:
    """The maps against float64 and the selection against a stable sort, two heads, 2000 tokens."""
    group = case.num_heads // case.num_kv_heads
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (CHECKED_LENGTH, 2 * group, case.head_dim)
    q = torch.randn(shape, generator=generator, device="cuda").bfloat16()
    k = torch.randn((shape[0], 2, shape[2]), generator=generator, device="cuda").bfloat16()
    first = generation_start_block(CHECKED_LENGTH, CHECKED_LENGTH // 3, case.block_size)
    arguments = {
        "first_generation_block": first,
        "block_size": case.block_size,
        "scale": case.head_dim**-0.5,
    }
    lse = None
    if case.lse_given:
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1))
        lse = (scores * case.head_dim**-0.5).logsumexp(dim=-1).float()
    maps = block_importance(q, k, lse=lse, **arguments)
    exact = block_importance_reference(q.double(), k.double(), **arguments)
    for result, expected in zip(maps, exact, strict=True):
        error = (result - expected).abs().max() / expected.max()
        if not error < ALLOWED_ERROR:
            raise SystemExit(f"{case.label}: relative error {error:.1e} of the importance")
    if not torch.equal(selected(*maps, case, True), selected(*maps, case, False)):
        raise SystemExit(f"{case.label}: the selection differs from a stable sort")


def selected(importance: Tensor, generation: Tensor, case: Case, kernel: bool) -> Tensor:
    """Index lists by the kernel or by PyTorch's stable sort; -1 behind each list."""
    num_heads, num_blocks, _ = importance.shape
    num_generation = generation.shape[2]
    first = num_blocks - num_generation
    slots = torch.arange(num_blocks, device="cuda")
    width = kept_blocks_bound(num_blocks, num_generation, case.select)
    indices = torch.full((num_blocks, num_heads, width), -1, dtype=torch.int16, device="cuda")
    counts = torch.zeros((num_blocks, num_heads), dtype=torch.int32, device="cuda")
    if kernel:
        select_blocks(
            importance,
            generation,
            first_generation_block=first,
            select=case.select,
            row_slots=slots,
            indices=indices,
            counts=counts,
        )
    else:
        select_blocks_torch(
            importance,
            generation,
            first_generation_block=first,
            num_kept=kept_columns(num_blocks, case.select),
            num_kept_generation=kept_columns(num_generation, case.select),
            row_slots=slots,
            indices=indices,
            counts=counts,
        )
    return indices


def milliseconds(function: Callable[[], object], repetitions: int) -> float:
    return triton.testing.do_bench(function, warmup=20, rep=repetitions, return_mode="median")


def straightforward(layer: Layer, case: Case) -> None:
    """Plain PyTorch, one head at a time so that its L x L probabilities fit at all."""
    group = case.num_heads // case.num_kv_heads
    first = generation_start_block(case.length, case.canvas, case.block_size)
    for head in range(case.num_heads):
        kv_head = head // group
        maps = block_importance_reference(
            layer.q[:, head : head + 1],
            layer.k[:, kv_head : kv_head + 1],
            first_generation_block=first,
            block_size=case.block_size,
            scale=case.head_dim**-0.5,
        )
        for scores in maps:
            scores.topk(kept_columns(scores.shape[2], case.select), dim=-1)


def measure(case: Case) -> dict[str, str]:
    verify(case)
    layer = make_layer(case)
    layer.build(case)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer.build(case)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    repetitions = 100 if case.length < 50_000 else 400
    pattern = milliseconds(lambda: layer.build(case), repetitions)
    products = 2 * case.length**2 * case.num_heads * case.head_dim  # one q k^T
    row = {
        "case": case.label,
        "build ms": f"{pattern:.2f}",
        "TFLOP/s": f"{products / pattern * 1e-9:.0f}",
        "peak MiB": f"{peak / 2**20:.0f}",
        "FA3 ms": "-",
        "build / FA3": "-",
        "PyTorch ms": "-",
        "density": f"{layer.counts.float().mean() / (case.length / case.block_size):.3f}",
    }
    dense = dense_attention()
    if dense is not None:
        attention = milliseconds(lambda: dense(layer.q, layer.k, layer.v), repetitions)
        row["FA3 ms"] = f"{attention:.2f}"
        row["build / FA3"] = f"{pattern / attention:.2f}"
    if case.length <= 16384 and case.lse_given and case.block_size == 128:
        row["PyTorch ms"] = f"{milliseconds(lambda: straightforward(layer, case), 50):.1f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
        f"Python {platform.python_version()}; bfloat16, medians; G: canvas tokens"
    )
    rows = []
    for case in CASES:
        rows.append(measure(case))
        if len(rows) == 1:
            print("  ".join(f"{name:>{WIDTHS.get(name, 11)}}" for name in rows[0]))
        print("  ".join(f"{v:>{WIDTHS.get(n, 11)}}" for n, v in rows[-1].items()), flush=True)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
