"""Block-sparse attention against the dense-mask reference in float64.

Without a GPU the Triton kernel runs in its interpreter, in float32 and float16 on a pairwise subset
of the grid; `-m gpu` runs the whole grid on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_sparsed.kernels.block_sparse_attention import (
    QueryTiles,
    block_sparse_attention,
    block_sparse_attention_torch,
    warm_up,
)
from vllm_sparsed.kernels.block_sparse_attention.reference import block_sparse_attention_reference

LENGTHS = (1, 63, 128, 129, 1000)
GQA_RATIOS = (1, 7, 8)
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
# Packed between the requests, and before and after them: tokens that nobody may read or write.
GAP = 5


@dataclass
class Problem:
    """One packed batch with a random pattern, NaN wherever nothing may be read."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor
    tiles: QueryTiles
    requests: list[slice]

    def arguments(self, dtype: torch.dtype) -> tuple[Any, ...]:
        q, k, v = (x.to(dtype) for x in (self.q, self.k, self.v))
        return q, k, v, self.indices, self.counts, self.tiles

    @property
    def scale(self) -> float:
        return self.q.shape[2] ** -0.5


def make_problem(
    lengths: Sequence[int],
    *,
    gqa_ratio: int = 1,
    num_kv_heads: int = 1,
    block_size: int = 64,
    head_dim: int = 64,
    dtype: torch.dtype = FLOAT32,
    device: str = "cpu",
    keep: float | Callable[[int], int] = 0.4,
    index_dtype: torch.dtype = torch.int16,
    seed: int = 0,
) -> Problem:
    """`keep` is the share of key blocks per row, or gives the count from the number of blocks."""
    generator = torch.Generator().manual_seed(seed)
    num_heads = gqa_ratio * num_kv_heads
    num_blocks = [-(-length // block_size) for length in lengths]
    tokens = sum(lengths) + GAP * (len(lengths) + 1)
    starts = [GAP * (i + 1) + sum(lengths[:i]) for i in range(len(lengths))]
    requests = [slice(a, a + length) for a, length in zip(starts, lengths, strict=True)]

    qkv = torch.full((tokens, num_heads + 2 * num_kv_heads, head_dim), float("nan"))
    for tokens_of_request in requests:
        shape = qkv[tokens_of_request].shape
        qkv[tokens_of_request] = torch.randn(shape, generator=generator)
    # Views of one fused tensor, as models hand them over.
    q, k, v = qkv.to(device, dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    spare_rows = 3
    total = sum(num_blocks) + spare_rows
    slots = torch.randperm(total, generator=generator)[: sum(num_blocks)].tolist()
    invalid = torch.iinfo(index_dtype).max
    indices = torch.full((total, num_heads, max(num_blocks)), invalid, dtype=index_dtype)
    counts = torch.full((total, num_heads), invalid, dtype=torch.int32)
    pattern_rows = []
    for n in num_blocks:
        pattern_rows.append([slots.pop() for _ in range(n)])
        for slot, head in product(pattern_rows[-1], range(num_heads)):
            if callable(keep):
                count = keep(n)
            else:
                jitter = int(torch.randint(0, 2, (1,), generator=generator))
                count = max(1, min(n, int(keep * n) + jitter))
            kept = torch.randperm(n, generator=generator)[:count].sort().values
            indices[slot, head, :count] = kept.to(index_dtype)
            counts[slot, head] = count
    return Problem(
        q, k, v, indices.to(device), counts.to(device),
        QueryTiles.build(starts, lengths, pattern_rows, block_size, device), requests,
    )  # fmt: skip


def run(
    function: Callable[..., Tensor], problem: Problem, dtype: torch.dtype | None = None
) -> Tensor:
    """The function's output into a NaN-filled tensor."""
    dtype = dtype or problem.q.dtype
    out = torch.full(problem.q.shape, float("nan"), dtype=dtype, device=problem.q.device)
    result = function(*problem.arguments(dtype), scale=problem.scale, out=out)
    assert result is out
    return out


def assert_accurate(out: Tensor, problem: Problem) -> None:
    """At most twice the error of PyTorch in the same dtype, and nothing else written."""
    exact = run(block_sparse_attention_reference, problem, torch.float64)
    plain = run(block_sparse_attention_reference, problem)
    untouched = torch.ones(len(out), dtype=torch.bool)
    for tokens in problem.requests:
        untouched[tokens] = False
        error = (out[tokens].double() - exact[tokens]).abs().max().item()
        allowed = 2 * (plain[tokens].double() - exact[tokens]).abs().max().item()
        if out.dtype == FLOAT32:
            # The order of float32 sums differs between libraries: one more rounding of the largest.
            allowed += torch.finfo(FLOAT32).eps * exact[tokens].abs().max().item()
        assert error <= allowed, f"error {error:.3g} > {allowed:.3g} for tokens {tokens}"
    assert out[untouched.to(out.device)].isnan().all(), "wrote outside of the requests"


def pairwise(*dimensions: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations in which every two values of different dimensions meet."""
    wanted = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(dimensions)), 2)
        for a, b in product(dimensions[i], dimensions[j])
    }

    def covered(case: tuple[Any, ...]) -> set[Any]:
        return set(combinations(enumerate(case), 2))

    cases = []
    candidates = list(product(*dimensions))
    while wanted:
        best = max(candidates, key=lambda case: len(covered(case) & wanted))
        wanted -= covered(best)
        cases.append(best)
    return cases


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(
    ("length", "head_dim", "block_size", "gqa_ratio", "dtype"),
    pairwise(LENGTHS, HEAD_DIMS, BLOCK_SIZES, GQA_RATIOS, (FLOAT32, FLOAT16)),
    ids=name_of,
)
def test_pairwise(
    length: int, head_dim: int, block_size: int, gqa_ratio: int, dtype: torch.dtype, device: str
) -> None:
    problem = make_problem(
        [length], gqa_ratio=gqa_ratio, block_size=block_size, head_dim=head_dim, dtype=dtype,
        device=device, keep=0.1 if length == 1000 else 0.4,
    )  # fmt: skip
    assert_accurate(run(block_sparse_attention, problem), problem)


def test_long_request(device: str) -> None:
    problem = make_problem([4097], block_size=128, head_dim=64, dtype=FLOAT16, device=device)
    assert_accurate(run(block_sparse_attention, problem), problem)


# One batch shorter than some block, which tile sizes of the sm_90 kernels exclude, and one longer.
GPU_BATCHES = {"short": (1, 63), "long": (128, 129, 1000, 4097)}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", GPU_BATCHES)
@pytest.mark.parametrize("gqa_ratio", GQA_RATIOS, ids=lambda x: f"gqa{x}")
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=lambda x: f"block{x}")
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda x: f"dim{x}")
def test_full_grid(
    head_dim: int, dtype: torch.dtype, block_size: int, gqa_ratio: int, batch: str, device: str
) -> None:
    problem = make_problem(
        GPU_BATCHES[batch], gqa_ratio=gqa_ratio, block_size=block_size, head_dim=head_dim,
        dtype=dtype, device=device,
    )  # fmt: skip
    assert_accurate(run(block_sparse_attention, problem), problem)


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_patterns(data: st.DataObject, block_size: int, where: str, device: str) -> None:
    lengths = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=3), label="lengths")
    problem = make_problem(
        lengths,
        gqa_ratio=data.draw(st.sampled_from([1, 2, 7]), label="gqa_ratio"),
        num_kv_heads=data.draw(st.integers(1, 2), label="num_kv_heads"),
        block_size=block_size,
        head_dim=128 if where == "gpu" else 16,
        dtype=FLOAT16,
        device=device,
        keep=data.draw(st.floats(0.01, 1.0), label="keep"),
        index_dtype=data.draw(st.sampled_from([torch.int16, torch.int32]), label="index_dtype"),
        seed=data.draw(st.integers(0, 2**31), label="seed"),
    )
    assert_accurate(run(block_sparse_attention, problem), problem)


PATTERNS = {
    "one block per row": lambda n: 1,
    "all blocks": lambda n: n,
    "nothing": lambda n: 0,
}


def check_pattern(pattern: str, block_size: int, dtype: torch.dtype, device: str) -> None:
    problem = make_problem(
        [129, 200, 1, 65], gqa_ratio=2, num_kv_heads=2, block_size=block_size,
        head_dim=64 if device == "cuda" else 32, dtype=dtype, device=device,
        keep=PATTERNS[pattern],
    )  # fmt: skip
    out = run(block_sparse_attention, problem)
    assert_accurate(out, problem)
    if pattern == "nothing":
        assert all(out[tokens].eq(0).all() for tokens in problem.requests)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_extreme_patterns(pattern: str, block_size: int, device: str) -> None:
    check_pattern(pattern, block_size, FLOAT32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=name_of)
def test_extreme_patterns_gpu(
    pattern: str, block_size: int, dtype: torch.dtype, device: str
) -> None:
    check_pattern(pattern, block_size, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["one block per row", "nothing"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_extreme_patterns_of_long_requests(pattern: str, block_size: int, device: str) -> None:
    problem = make_problem(
        [1000, 257, 4097], gqa_ratio=2, num_kv_heads=2, block_size=block_size, head_dim=128,
        dtype=BFLOAT16, device=device, keep=PATTERNS[pattern],
    )  # fmt: skip
    out = run(block_sparse_attention, problem)
    assert_accurate(out, problem)
    if pattern == "nothing":
        assert all(out[tokens].eq(0).all() for tokens in problem.requests)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_offsets_beyond_32_bits(block_size: int, device: str) -> None:
    """The last tokens of a packed tensor of more than 2**31 elements."""
    num_heads, head_dim, length = 32, 128, 600
    tokens = 2**31 // (3 * num_heads * head_dim) + 2 * length
    qkv = torch.zeros(tokens, 3 * num_heads, head_dim, dtype=BFLOAT16, device=device)
    qkv[-length:].normal_()
    out = torch.zeros(tokens, num_heads, head_dim, dtype=BFLOAT16, device=device)
    n = -(-length // block_size)
    indices = torch.arange(n, dtype=torch.int16, device=device).repeat(n, num_heads, 1)
    counts = torch.full((n, num_heads), n, dtype=torch.int32, device=device)
    tiles = QueryTiles.build([tokens - length], [length], [range(n)], block_size, device)
    q, k, v = qkv.split(num_heads, dim=1)
    block_sparse_attention(q, k, v, indices, counts, tiles, scale=head_dim**-0.5, out=out)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x[-length:].transpose(0, 1).float() for x in (q, k, v))
    ).transpose(0, 1)
    torch.testing.assert_close(out[-length:].float(), dense, atol=1e-2, rtol=1e-2)
    assert out[:-length].eq(0).all()


@pytest.mark.gpu
def test_warm_up_compiles_everything(device: str) -> None:
    """After the warm-up no call compiles another kernel."""
    from vllm_sparsed.kernels.block_sparse_attention import kernel

    warm_up(14, 2, 64, FLOAT16, BLOCK_SIZES, index_dtype=torch.int16, device=device)
    compiled = kernel.block_sparse_forward.device_caches[torch.cuda.current_device()][0]
    before = len(compiled)
    for block_size in BLOCK_SIZES:
        problem = make_problem(
            [1000, 77, 8], gqa_ratio=7, num_kv_heads=2, block_size=block_size, head_dim=64,
            dtype=FLOAT16, device=device,
        )  # fmt: skip
        run(block_sparse_attention, problem)
    assert before > 0
    assert len(compiled) == before


@pytest.mark.parametrize(
    ("length", "block_size", "gqa_ratio", "dtype"),
    pairwise(LENGTHS, BLOCK_SIZES, GQA_RATIOS, (FLOAT32, FLOAT16, BFLOAT16)),
    ids=name_of,
)
def test_torch_path(length: int, block_size: int, gqa_ratio: int, dtype: torch.dtype) -> None:
    problem = make_problem(
        [length, 37], gqa_ratio=gqa_ratio, block_size=block_size, head_dim=32, dtype=dtype
    )
    assert_accurate(run(block_sparse_attention_torch, problem), problem)


@pytest.mark.parametrize("block_size", [16, 128])
def test_torch_path_on_a_long_request(block_size: int) -> None:
    problem = make_problem([4097], block_size=block_size, head_dim=32)
    assert_accurate(run(block_sparse_attention_torch, problem), problem)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_torch_path_extreme_patterns(pattern: str) -> None:
    problem = make_problem([129, 300, 1], gqa_ratio=2, block_size=32, keep=PATTERNS[pattern])
    assert_accurate(run(block_sparse_attention_torch, problem), problem)


def test_keeping_all_blocks_is_dense_attention(device: str) -> None:
    problem = make_problem(
        [130], gqa_ratio=2, block_size=32, head_dim=32, device=device, keep=PATTERNS["all blocks"]
    )
    (tokens,) = problem.requests
    q, k, v = (x[tokens].transpose(0, 1) for x in (problem.q, problem.k, problem.v))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    out = run(block_sparse_attention, problem)[tokens].transpose(0, 1)
    torch.testing.assert_close(out, dense, atol=2e-6, rtol=1e-5)
