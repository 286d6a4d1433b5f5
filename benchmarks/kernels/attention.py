"""Speed of the block-sparse attention against dense and sparse peers, on one CUDA device.

    python benchmarks/kernels/attention.py [--cases NAME ...] [--csv FILE]

Every provider is checked against float64 before it is timed; times are medians of
`triton.testing.do_bench` in one process. TFLOP/s count the kept blocks of sparse providers and all
blocks of dense ones.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_sparsed.kernels.block_sparse_attention import QueryTiles, block_sparse_attention

Run = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One shape. `select` is the share of key blocks that each row keeps."""

    length: int
    block_size: int
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    select: float = 0.3
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "llada-4k": Case(4096, 128),
    "llada-16k": Case(16384, 128),
    "llada-64k": Case(65536, 128),
    "dream-16k": Case(16384, 128, 28, 4),
    "dream-64k": Case(65536, 128, 28, 4),
    "block64-4k": Case(4096, 64),
    "block64-16k": Case(16384, 64),
    "block64-64k": Case(65536, 64),
    "block32-4k": Case(4096, 32),
    "block32-16k": Case(16384, 32),
    "block32-4k-half": Case(4096, 32, select=0.5),
    "block16-4k": Case(4096, 16),
    "dim64-16k": Case(16384, 128, head_dim=64),
    "dim96-16k": Case(16384, 128, head_dim=96),
    "dim256-16k": Case(16384, 128, 16, 16, head_dim=256),
    "float32-4k": Case(4096, 128, dtype=torch.float32),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    case: Case
    q: Tensor  # [length, num_heads, head_dim], a view of one fused tensor as k and v are
    k: Tensor
    v: Tensor
    indices: Tensor  # int16 [num_blocks, num_heads, kept]
    counts: Tensor

    @classmethod
    def random(cls, case: Case) -> Inputs:
        heads = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
        qkv = torch.randn(case.length, sum(heads), case.head_dim, device="cuda", dtype=case.dtype)
        n = -(-case.length // case.block_size)
        kept = max(1, round(case.select * n))
        indices = torch.empty(n, case.num_heads, kept, dtype=torch.int16, device="cuda")
        for head in range(case.num_heads):
            chosen = torch.rand(n, n, device="cuda").topk(kept, dim=1).indices
            indices[:, head] = chosen.sort(dim=1).values.to(torch.int16)
        counts = torch.full((n, case.num_heads), kept, dtype=torch.int32, device="cuda")
        q, k, v = qkv.split(heads, dim=1)
        return cls(case, q, k, v, indices, counts)

    @property
    def scale(self) -> float:
        return self.case.head_dim**-0.5

    @property
    def density(self) -> float:
        return self.indices.shape[2] / self.indices.shape[0]

    def flops(self, density: float) -> float:
        case = self.case
        return 4 * case.length**2 * density * case.head_dim * case.num_heads


def ours(x: Inputs) -> Run:
    case = x.case
    rows = range(x.indices.shape[0])
    tiles = QueryTiles.build([0], [case.length], [rows], case.block_size, "cuda")
    out = torch.empty(x.q.shape, dtype=case.dtype, device="cuda")
    return lambda: block_sparse_attention(
        x.q, x.k, x.v, x.indices, x.counts, tiles, scale=x.scale, out=out
    )


def flash_attention_3(x: Inputs) -> Run:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    bounds = torch.tensor([0, x.case.length], dtype=torch.int32, device="cuda")
    return lambda: flash_attn_varlen_func(
        x.q, x.k, x.v, max_seqlen_q=x.case.length, cu_seqlens_q=bounds,
        max_seqlen_k=x.case.length, cu_seqlens_k=bounds, softmax_scale=x.scale, fa_version=3,
    )  # fmt: skip


def batched(x: Inputs) -> list[Tensor]:
    """q, k, v as [1, num_heads, length, head_dim], keys repeated for grouped heads."""
    repeats = x.case.num_heads // x.case.num_kv_heads
    heads = (x.q, x.k.repeat_interleave(repeats, 1), x.v.repeat_interleave(repeats, 1))
    return [y.transpose(0, 1)[None].contiguous() for y in heads]


def sdpa(backend: SDPBackend) -> Callable[[Inputs], Run]:
    def provider(x: Inputs) -> Run:
        q, k, v = batched(x)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)

        return run

    return provider


def flex_attention_full_blocks(x: Inputs) -> Run:
    """FlexAttention told that every kept block is kept whole, so that it masks nothing."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = batched(x)
    n, _, kept = x.indices.shape
    counts = x.counts.T[None].contiguous()
    indices = torch.zeros(1, x.case.num_heads, n, n, dtype=torch.int32, device="cuda")
    indices[0, :, :, :kept] = x.indices.transpose(0, 1)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(indices), counts, indices,
        BLOCK_SIZE=x.case.block_size, seq_lengths=(x.case.length, x.case.length),
        compute_q_blocks=False,
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask)[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Provider:
    make: Callable[[Inputs], Run]
    sparse: bool
    serves: Callable[[Case], bool] = lambda case: True


def _half(case: Case) -> bool:
    return case.dtype != torch.float32


PROVIDERS = {
    "ours": Provider(ours, sparse=True),
    "FlashAttention 3, dense": Provider(flash_attention_3, sparse=False, serves=_half),
    "FlashAttention 2, dense": Provider(sdpa(SDPBackend.FLASH_ATTENTION), False, _half),
    "cuDNN, dense": Provider(
        sdpa(SDPBackend.CUDNN_ATTENTION), False, lambda c: _half(c) and c.head_dim <= 128
    ),
    "FlexAttention, full blocks": Provider(
        flex_attention_full_blocks, True, lambda c: _half(c) and c.block_size == 128
    ),
}


def exact_rows(x: Inputs, sparse: bool, rows: Tensor) -> Tensor:
    """Float64 attention of these queries: [rows, num_heads, head_dim]."""
    case = x.case
    out = torch.empty(len(rows), case.num_heads, case.head_dim, dtype=torch.float64, device="cuda")
    position = torch.arange(case.length, device="cuda") // case.block_size
    for head in range(case.num_heads):
        kv_head = head * case.num_kv_heads // case.num_heads
        scores = x.q[rows, head].double() @ x.k[:, kv_head].double().T * x.scale
        if sparse:
            kept = torch.zeros(len(rows), x.indices.shape[0], dtype=torch.bool, device="cuda")
            kept.scatter_(1, x.indices[rows // case.block_size, head].long(), True)
            scores.masked_fill_(~kept[:, position], float("-inf"))
        out[:, head] = torch.softmax(scores, dim=-1) @ x.v[:, kv_head].double()
    return out


def verify(out: Tensor, x: Inputs, sparse: bool) -> None:
    """Raise if a sample of rows is further from float64 than rounding explains."""
    rows = torch.randint(0, x.case.length, (64,), device="cuda")
    exact = exact_rows(x, sparse, rows)
    error = (out[rows].double() - exact).abs().max().item()
    # In 16 bits outputs and weights are rounded once each; in float32 long sums round many times.
    roundings = 32 if x.case.dtype == torch.float32 else 4
    allowed = roundings * torch.finfo(x.case.dtype).eps * exact.abs().max().item()
    if not error <= allowed:
        raise RuntimeError(f"wrong result: error {error:.2e}, allowed {allowed:.2e}")


def measure(names: list[str], providers: list[str]) -> Iterator[dict[str, str]]:
    for name in names:
        case = CASES[name]
        torch.manual_seed(0)
        x = Inputs.random(case)
        for provider_name in providers:
            provider = PROVIDERS[provider_name]
            if not provider.serves(case):
                continue
            row = {"case": name, "provider": provider_name, "ms": "-", "TFLOP/s": "-"}
            density = x.density if provider.sparse else 1.0
            row["density"] = f"{density:.4f}"
            try:
                run = provider.make(x)
                verify(run(), x, provider.sparse)
            except (ImportError, RuntimeError) as error:
                row["note"] = str(error).splitlines()[0][:60]
            else:
                ms = triton.testing.do_bench(run, warmup=25, rep=150, return_mode="median")
                row |= {"ms": f"{ms:.3f}", "TFLOP/s": f"{x.flops(density) / ms / 1e9:.0f}"}
            yield row
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--csv", help="write the rows to this file as well")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    columns = ["case", "provider", "ms", "TFLOP/s", "density", "note"]
    rows = []
    for row in measure(options.cases, options.providers):
        rows.append(row)
        print("{:16} {:27} {:>9} {:>8} {:>8} {}".format(*(row.get(c, "") for c in columns)))
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
