"""Attention of windows over paged keys against the dense-mask reference in float64.

Without a GPU the Triton kernels run in their interpreter, in float32 and float16 on a pairwise
subset of the grid; `-m gpu` runs the whole grid on a CUDA device. Whatever nobody may read is NaN:
pages of other sequences, blocks that no row keeps, and the tail of each last page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_sparsed.kernels.window_attention import (
    MAX_SPLITS,
    Window,
    WindowTiles,
    num_tiles_bound,
    warm_up,
    window_attention,
    window_attention_torch,
    workspace_bytes,
)
from vllm_sparsed.kernels.window_attention.reference import window_attention_reference
from vllm_sparsed.kernels.window_attention.window_tiles import PROGRAMS, Field, split

PAGE_SIZE = 128
ROWS = (1, 16, 64, 100, 256)
KEYS = (1, 127, 129, 384, 700)
GQA_RATIOS = (1, 4, 7, 8)
BLOCK_SIZES = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
BFLOAT16, FLOAT16, FLOAT32, FP8 = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
)
KEEP = 0.3
# Between the rows of windows, and before and after them: rows that nobody may read or write.
GAP = 3


@dataclass
class Problem:
    """Windows of several sequences, their store and their patterns."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    windows: list[Window]
    block_size: int
    indices: Tensor
    counts: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    def tiles(self, **options: int) -> WindowTiles:
        device = self.q.device
        return WindowTiles.build(self.windows, self.block_size, self.num_heads, device, **options)

    def common(self) -> dict[str, Any]:
        return {
            "indices": self.indices,
            "counts": self.counts,
            "scale": self.q.shape[2] ** -0.5,
            "k_scale": self.k_scale,
            "v_scale": self.v_scale,
        }

    def run(self, function: Any = window_attention, **options: int) -> Tensor:
        """The function's output into a NaN-filled tensor."""
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        result = function(
            self.q, self.k_pages, self.v_pages, self.block_table, self.tiles(**options),
            **self.common(), out=out,
        )  # fmt: skip
        assert result is out
        return out

    def reference(self, dtype: torch.dtype) -> Tensor:
        shape, device = self.q.shape, self.q.device
        pages = (self.k_pages, self.v_pages)
        if self.k_scale is None:
            pages = (self.k_pages.to(dtype), self.v_pages.to(dtype))
        return window_attention_reference(
            self.q.to(dtype), *pages, self.block_table, self.windows, block_size=self.block_size,
            **self.common(), out=torch.full(shape, float("nan"), dtype=dtype, device=device),
        )  # fmt: skip

    def alone(self, i: int) -> Problem:
        """The i-th window without the others, its rows the only ones."""
        window = self.windows[i]
        rows = slice(window.first_row, window.first_row + window.num_rows)
        return replace(self, q=self.q[rows], windows=[replace(window, first_row=0)])


def make_problem(
    shapes: Sequence[tuple[int, int, int]],
    *,
    gqa_ratio: int = 1,
    num_kv_heads: int = 1,
    block_size: int = 64,
    head_dim: int = 64,
    dtype: torch.dtype = FLOAT32,
    pages_dtype: torch.dtype | None = None,
    dense: Sequence[bool] = (),
    keep: float = KEEP,
    head_major: bool = True,
    index_dtype: torch.dtype = torch.int16,
    device: str = "cpu",
    seed: int = 0,
) -> Problem:
    """One window for each (rows, first position, tokens of the sequence).

    `dense` says which windows have no pattern; `keep` is the share of key blocks on a list.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads = gqa_ratio * num_kv_heads
    dense = dense or [False] * len(shapes)
    pages_dtype = pages_dtype or dtype
    num_blocks = [-(-length // block_size) for _, _, length in shapes]
    num_pages = [-(-length // PAGE_SIZE) for _, _, length in shapes]
    spare = 2
    page_order = torch.randperm(sum(num_pages) + spare, generator=generator).tolist()
    slots = torch.randperm(sum(num_blocks) + spare, generator=generator).tolist()
    width = max(num_blocks)
    invalid = torch.iinfo(index_dtype).max
    indices = torch.full((len(slots), num_heads, width), invalid, dtype=index_dtype)
    counts = torch.full((len(slots), num_heads), invalid, dtype=torch.int32)
    # An entry of the table that nobody may follow.
    block_table = torch.full((len(shapes), max(num_pages) + 1), 10**9, dtype=torch.int32)
    store = torch.full(
        (len(page_order), num_kv_heads, PAGE_SIZE, 2 * head_dim), float("nan"), dtype=FLOAT32
    )
    windows, first_row = [], GAP
    for i, (num_rows, first_position, length) in enumerate(shapes):
        pages = [page_order.pop() for _ in range(num_pages[i])]
        block_table[i, : len(pages)] = torch.tensor(pages)
        first_block = first_position // block_size
        last_block = (first_position + num_rows - 1) // block_size
        pattern_rows = [] if dense[i] else [slots.pop() for _ in range(first_block, last_block + 1)]
        # [stored head, token]: what some row keeps.
        read = torch.full((num_kv_heads, num_blocks[i] * block_size), dense[i])
        read[:, first_block * block_size : (last_block + 1) * block_size] = True
        for slot, head in product(pattern_rows, range(num_heads)):
            count = int(keep * num_blocks[i] + float(torch.rand(1, generator=generator)))
            kept = torch.randperm(num_blocks[i], generator=generator)[:count].sort().values
            indices[slot, head, :count] = kept.to(index_dtype)
            counts[slot, head] = count
            read.view(num_kv_heads, -1, block_size)[head // gqa_ratio, kept] = True
        values = torch.randn(num_kv_heads, length, 2 * head_dim, generator=generator)
        values = values.masked_fill(~read[:, :length, None], float("nan"))
        for page, index in enumerate(pages):
            part = values[:, page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            store[index, :, : part.shape[1]] = part
        windows.append(
            Window(first_row, num_rows, first_position, length, i, pattern_rows, num_blocks[i])
        )
        first_row += num_rows + GAP
    scales: list[Tensor | None] = [None, None]
    if pages_dtype == FP8:
        scales = [torch.tensor([x], device=device) for x in (2**-6, 1.5 * 2**-6)]
        store[..., :head_dim] /= 2**-6
        store[..., head_dim:] /= 1.5 * 2**-6
    store = store.to(device, pages_dtype)
    if not head_major:
        # vLLM's layout with the tokens of a page before the heads.
        store = store.transpose(1, 2).contiguous().transpose(1, 2)
    k_pages, v_pages = store.transpose(1, 2).split(head_dim, dim=-1)
    qkv = torch.full((first_row, num_heads + 2 * num_kv_heads, head_dim), float("nan"))
    for window in windows:
        rows = slice(window.first_row, window.first_row + window.num_rows)
        qkv[rows] = torch.randn(qkv[rows].shape, generator=generator)
    # A view of one fused tensor, as models hand it over.
    q = qkv.to(device, dtype)[:, :num_heads]
    return Problem(
        q, k_pages, v_pages, block_table.to(device), windows, block_size, indices.to(device),
        counts.to(device), *scales,
    )  # fmt: skip


def assert_accurate(out: Tensor, problem: Problem) -> None:
    """At most twice the error of PyTorch in the same dtype, and nothing else written."""
    exact = problem.reference(torch.float64)
    plain = problem.reference(problem.q.dtype)
    written = torch.zeros(len(out), dtype=torch.bool, device=out.device)
    for window in problem.windows:
        written[window.first_row : window.first_row + window.num_rows] = True
    out_error, plain_error = (
        (x[written].double() - exact[written]).abs().max().item() for x in (out, plain)
    )
    # One rounding of the result is always allowed: PyTorch may be exact on a single key. In float32
    # on a GPU it comes on top: exp and division round there once more.
    one_rounding = torch.finfo(out.dtype).eps * exact[written].abs().max().item()
    allowed = max(2 * plain_error, one_rounding)
    if out.is_cuda and out.dtype == torch.float32:
        allowed = 2 * plain_error + one_rounding
    assert out_error <= allowed, f"error {out_error:.3e}, allowed {allowed:.3e}"
    assert out[~written].isnan().all(), "wrote rows of no window"


def place(num_rows: int, num_keys: int) -> tuple[int, int, int]:
    """A window near the end of a sequence, across a border of blocks where there is room."""
    num_keys = max(num_rows, num_keys)
    return num_rows, max(0, num_keys - num_rows - 20), num_keys


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations that contain every pair of values of two factors."""
    pairs = {
        (i, a, j, b)
        for (i, x), (j, y) in combinations(enumerate(factors), 2)
        for a, b in product(x, y)
    }
    chosen = []
    while pairs:
        best = max(
            product(*factors),
            key=lambda row: sum(
                (i, row[i], j, row[j]) in pairs for i, j in combinations(range(len(row)), 2)
            ),
        )
        chosen.append(best)
        pairs -= {(i, best[i], j, best[j]) for i, j in combinations(range(len(best)), 2)}
    return chosen


def name_of(value: Any) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(
    ("num_keys", "num_rows", "block_size", "gqa_ratio", "dtype"),
    # More rows take the interpreter minutes, see below.
    pairwise(KEYS, ROWS[:-1], BLOCK_SIZES, GQA_RATIOS, (FLOAT32, FLOAT16)),
    ids=name_of,
)
def test_pairwise(
    num_keys: int, num_rows: int, block_size: int, gqa_ratio: int, dtype: torch.dtype, device: str
) -> None:
    problem = make_problem(
        [place(num_rows, num_keys)], gqa_ratio=gqa_ratio, block_size=block_size, head_dim=32,
        dtype=dtype, device=device,
    )  # fmt: skip
    assert_accurate(problem.run(), problem)


@pytest.mark.parametrize("block_size", [32, 128])
def test_many_rows(block_size: int, device: str) -> None:
    problem = make_problem(
        [place(256, 300)], block_size=block_size, head_dim=16, dtype=FLOAT16, device=device
    )
    assert_accurate(problem.run(), problem)


def test_long_sequence(device: str) -> None:
    problem = make_problem(
        [(64, 3980, 4097)], block_size=128, head_dim=64, dtype=FLOAT16, device=device
    )
    assert problem.tiles().max_splits > 1
    assert_accurate(problem.run(), problem)


@pytest.mark.parametrize("head_major", [True, False], ids=["head-major", "token-major"])
@pytest.mark.parametrize("head_dim", [16, 80, 256])
def test_head_dims_and_layouts(head_dim: int, head_major: bool, device: str) -> None:
    problem = make_problem(
        [(20, 100, 300)], gqa_ratio=2, num_kv_heads=2, head_dim=head_dim, dtype=FLOAT16,
        head_major=head_major, index_dtype=torch.int32, device=device,
    )  # fmt: skip
    assert_accurate(problem.run(), problem)


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=name_of)
def test_fp8_pages(dtype: torch.dtype, device: str) -> None:
    problem = make_problem(
        [(40, 50, 200), (10, 600, 630)], gqa_ratio=4, block_size=32, head_dim=32, dtype=dtype,
        pages_dtype=FP8, device=device,
    )  # fmt: skip
    assert_accurate(problem.run(), problem)


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_all_values_of_fp8(where: str, device: str) -> None:
    """Each of the 254 finite values comes back exactly, as the value of a lone key."""
    values = torch.arange(256, dtype=torch.uint8)
    values = values[values.view(FP8).float().isfinite()]
    bits = torch.zeros(16 * 16, dtype=torch.uint8)
    bits[: len(values)] = values
    pages = torch.zeros(16, PAGE_SIZE, 1, 16, dtype=torch.uint8)
    pages[:, 0, 0] = bits.view(16, 16)
    pages = pages.view(FP8).to(device)
    q = torch.zeros(16, 1, 16, dtype=FLOAT16, device=device)
    one = torch.ones(1, device=device)
    out = window_attention(
        q, pages, pages, torch.arange(16, dtype=torch.int32, device=device)[:, None],
        WindowTiles.build([Window(i, 1, 0, 1, i) for i in range(16)], 128, 1, device),
        scale=1.0, k_scale=one, v_scale=one, out=torch.empty_like(q),
    )  # fmt: skip
    assert torch.equal(out.flatten().cpu(), bits.view(FP8).to(FLOAT16))


# Rows, first position and tokens of each window.
BATCH = [(64, 400, 700), (1, 0, 1), (33, 31, 100), (16, 1000, 1016), (5, 0, 129)]


def check_batch(device: str, dtype: torch.dtype, **options: Any) -> None:
    """Dense and sparse windows in one launch are right, and the same bits as each alone."""
    problem = make_problem(
        BATCH, gqa_ratio=2, num_kv_heads=2, dtype=dtype, device=device,
        dense=[False, True, False, False, True], **options,
    )  # fmt: skip
    out = problem.run()
    assert_accurate(out, problem)
    tiles = problem.tiles()
    padded = problem.run(num_tiles=tiles.num_tiles + 3, max_splits=tiles.max_splits + 3)
    assert torch.equal(out.nan_to_num(), padded.nan_to_num())
    for i, window in enumerate(problem.windows):
        rows = slice(window.first_row, window.first_row + window.num_rows)
        assert torch.equal(out[rows], problem.alone(i).run())


def test_batch(device: str) -> None:
    check_batch(device, FLOAT32, block_size=32, head_dim=16)


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_random_windows(data: st.DataObject, where: str, device: str) -> None:
    shapes = []
    for _ in range(data.draw(st.integers(1, 3))):
        length = data.draw(st.integers(1, 400))
        first = data.draw(st.integers(0, length - 1))
        shapes.append((data.draw(st.integers(1, min(256, length - first))), first, length))
    problem = make_problem(
        shapes,
        gqa_ratio=data.draw(st.sampled_from([1, 2, 7])),
        block_size=data.draw(st.sampled_from(BLOCK_SIZES)),
        head_dim=128 if where == "gpu" else 16,
        dtype=FLOAT16,
        dense=data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes))),
        keep=data.draw(st.floats(0.0, 1.0)),
        device=device,
        seed=data.draw(st.integers(0, 2**31)),
    )
    assert_accurate(problem.run(), problem)


def test_lists_longer_than_announced(device: str) -> None:
    """The splits follow from `max_listed`; keys beyond them are still attended to."""
    problem = make_problem([(8, 0, 1200)], block_size=32, head_dim=16, keep=0.9, device=device)
    problem.windows = [replace(problem.windows[0], max_listed=10)]
    assert_accurate(problem.run(), problem)


def test_no_windows(device: str) -> None:
    problem = make_problem([(1, 0, 1)], head_dim=16, device=device)
    problem.windows = []
    assert problem.run().isnan().all()
    assert problem.run(num_tiles=2).isnan().all()


@pytest.mark.parametrize(
    ("num_keys", "num_rows", "block_size", "gqa_ratio", "dtype"),
    pairwise((*KEYS, 4097), ROWS, BLOCK_SIZES, GQA_RATIOS, (FLOAT32, FLOAT16, BFLOAT16)),
    ids=name_of,
)
@pytest.mark.parametrize("pages", ["same", "fp8"])
def test_torch_path(
    num_keys: int, num_rows: int, block_size: int, gqa_ratio: int, dtype: torch.dtype, pages: str
) -> None:
    problem = make_problem(
        [place(num_rows, num_keys), (16, 30, 50)], gqa_ratio=gqa_ratio, block_size=block_size,
        head_dim=32, dtype=dtype, pages_dtype=FP8 if pages == "fp8" else dtype,
        dense=[num_keys == 384, False], head_major=num_rows != 16,
    )  # fmt: skip
    assert_accurate(problem.run(window_attention_torch), problem)


def test_torch_path_on_a_store_of_other_strides() -> None:
    """Rows that do not start at multiples of head_dim."""
    problem = make_problem([(64, 400, 700), (1, 0, 1)], gqa_ratio=2, head_dim=64)
    wider = torch.full((*problem.k_pages.shape[:3], 2 * 64 + 3), float("nan"))
    wider[..., 1:129] = torch.cat([problem.k_pages, problem.v_pages], dim=-1)
    problem.k_pages, problem.v_pages = wider[..., 1:65], wider[..., 65:129]
    assert_accurate(problem.run(window_attention_torch), problem)


def test_torch_path_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_sparsed.kernels.window_attention import torch_path

    monkeypatch.setattr(torch_path, "_CHUNK_ELEMENTS", 2**15)
    problem = make_problem([(64, 400, 700)], gqa_ratio=4, num_kv_heads=2)
    assert_accurate(problem.run(window_attention_torch), problem)


def test_torch_path_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the interpreter CPU tensors go to PyTorch, also in a batch and padded."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_batch("cpu", FLOAT32, block_size=64)


# Rows on the GPU too: one sequence shorter than a page, one long, a batch of both.
GPU_BATCHES = {
    "short": [(1, 0, 1), (16, 40, 63), (64, 64, 128)],
    "long": [(1, 4000, 4097), (64, 16100, 16384), (256, 9000, 10001), (100, 0, 1000)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("batch", GPU_BATCHES)
@pytest.mark.parametrize("gqa_ratio", GQA_RATIOS, ids=lambda x: f"gqa{x}")
@pytest.mark.parametrize("block_size", BLOCK_SIZES, ids=lambda x: f"block{x}")
@pytest.mark.parametrize("pages", ["same", "fp8"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=name_of)
@pytest.mark.parametrize("head_dim", HEAD_DIMS, ids=lambda x: f"dim{x}")
def test_full_grid(
    head_dim: int,
    dtype: torch.dtype,
    pages: str,
    block_size: int,
    gqa_ratio: int,
    batch: str,
    device: str,
) -> None:
    shapes = GPU_BATCHES[batch]
    problem = make_problem(
        shapes, gqa_ratio=gqa_ratio, block_size=block_size, head_dim=head_dim, dtype=dtype,
        pages_dtype=FP8 if pages == "fp8" else dtype, dense=[False, False, True, False],
        head_major=gqa_ratio != 4, device=device,
    )  # fmt: skip
    assert_accurate(problem.run(), problem)


@pytest.mark.gpu
@pytest.mark.parametrize("pages_dtype", [BFLOAT16, FP8], ids=name_of)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_batch_on_the_gpu(
    head_dim: int, block_size: int, pages_dtype: torch.dtype, device: str
) -> None:
    check_batch(device, BFLOAT16, block_size=block_size, head_dim=head_dim, pages_dtype=pages_dtype)


@pytest.mark.gpu
def test_bits_of_fp8_on_the_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The way of chips that do not convert e4m3 themselves gives the same bits."""
    from vllm_sparsed.kernels.window_attention import launch

    problem = make_problem(
        BATCH, gqa_ratio=2, dtype=BFLOAT16, pages_dtype=FP8, head_dim=128, device=device
    )
    native = problem.run()
    monkeypatch.setattr(launch, "has_fp8_conversion", lambda capability: False)
    assert torch.equal(native.nan_to_num(), problem.run().nan_to_num())


@pytest.mark.gpu
def test_cuda_graph(device: str) -> None:
    """A graph recorded for one batch serves another of no more tiles."""
    first = make_problem(BATCH, gqa_ratio=4, head_dim=128, dtype=BFLOAT16, device=device)
    num_tiles = sum(num_tiles_bound(rows, 64) for rows, _, _ in BATCH)
    tiles = first.tiles(num_tiles=num_tiles, max_splits=MAX_SPLITS)
    out = torch.zeros_like(first.q)
    call = (first.q, first.k_pages, first.v_pages, first.block_table, tiles)
    window_attention(*call, **first.common(), out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window_attention(*call, **first.common(), out=out)
    for windows in (first.windows, first.windows[1:3], first.windows[3:]):
        other = replace(first, windows=windows)
        tiles.table.copy_(other.tiles(num_tiles=num_tiles, max_splits=MAX_SPLITS).table)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out.nan_to_num(), other.run().nan_to_num())


@pytest.mark.gpu
def test_offsets_beyond_32_bits(device: str) -> None:
    """Pages at the end of a store of more than 2**31 elements."""
    num_heads, head_dim, length = 32, 128, 1000
    num_pages = 2**31 // (PAGE_SIZE * num_heads * 2 * head_dim) + 10
    store = torch.zeros(
        num_pages, num_heads, PAGE_SIZE, 2 * head_dim, dtype=BFLOAT16, device=device
    )
    store[-8:].normal_()
    k_pages, v_pages = store.transpose(1, 2).split(head_dim, dim=-1)
    table = torch.arange(num_pages - 8, num_pages, dtype=torch.int32, device=device)[None]
    q = torch.randn(64, num_heads, head_dim, dtype=BFLOAT16, device=device)
    tiles = WindowTiles.build([Window(0, 64, 900, length, 0)], 128, num_heads, device)
    out = torch.empty_like(q)
    window_attention(q, k_pages, v_pages, table, tiles, scale=head_dim**-0.5, out=out)
    k, v = (x[-8:].flatten(0, 1)[:length].transpose(0, 1).float() for x in (k_pages, v_pages))
    exact = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1).float(), k, v)
    torch.testing.assert_close(out.float(), exact.transpose(0, 1), atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
def test_warm_up_compiles_everything(device: str) -> None:
    from vllm_sparsed.kernels.window_attention import kernel

    problem = make_problem(BATCH, gqa_ratio=7, num_kv_heads=2, dtype=FLOAT16, device=device)
    warm_up(
        14, 2, 64, FLOAT16, BLOCK_SIZES, k_pages=problem.k_pages, v_pages=problem.v_pages,
        index_dtype=torch.int16, device=device,
    )  # fmt: skip
    caches = [
        function.device_caches[torch.cuda.current_device()][0]
        for function in (kernel.window_forward, kernel.combine_splits)
    ]
    before = [len(cache) for cache in caches]
    for block_size in BLOCK_SIZES:
        make_problem(
            BATCH, gqa_ratio=7, num_kv_heads=2, dtype=FLOAT16, block_size=block_size, device=device
        ).run()
    assert min(before) > 0
    assert [len(cache) for cache in caches] == before


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 96, 256])
@pytest.mark.parametrize("first_position", [0, 1, 15, 16, 100, 127])
def test_tiles_cover_each_row_once(num_rows: int, first_position: int, block_size: int) -> None:
    length = first_position + num_rows + 5
    first_block = first_position // block_size
    touched = (first_position + num_rows - 1) // block_size - first_block + 1
    sparse = Window(7, num_rows, first_position, length, 3, range(10, 10 + touched))
    dense = replace(sparse, pattern_rows=())
    for window in (sparse, dense):
        tiles = WindowTiles.build([window], block_size, 4, "cpu")
        assert tiles.num_tiles <= num_tiles_bound(num_rows, block_size)
        rows = []
        for column in tiles.table.T.tolist():
            first, count = column[Field.FIRST_ROW], column[Field.NUM_ROWS]
            positions = [first_position + row - 7 for row in range(first, first + count)]
            rows += range(first, first + count)
            assert column[Field.SEQ_LEN] == length
            assert column[Field.SEQUENCE] == 3
            if window is sparse:
                assert {p // block_size for p in positions} == {
                    first_block + column[Field.PATTERN_ROW] - 10
                }
                kept = (first_block, touched)
            else:
                assert column[Field.PATTERN_ROW] == -1
                kept = (0, -(-length // block_size))
            assert (column[Field.FIRST_TOUCHED], column[Field.NUM_TOUCHED]) == kept
        assert rows == list(range(7, 7 + num_rows))


@pytest.mark.parametrize("num_keys", [1, 256, 257, 1300, 4096, 65536])
@pytest.mark.parametrize("num_programs", [1, 32, 64, 264, 1000])
def test_splits_fill_the_chip_and_cover_all_keys(num_keys: int, num_programs: int) -> None:
    keys, splits = split(num_keys, num_programs)
    assert (splits - 1) * keys < num_keys <= splits * keys
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or splits * num_programs <= max(PROGRAMS, num_programs)


def test_workspace() -> None:
    assert workspace_bytes(2, 32, 128, 1) == 0
    assert workspace_bytes(2, 32, 80, 4) == 2 * 32 * 4 * 64 * (128 + 2) * 4


WINDOW = Window(0, 4, 60, 100, 0, (0,))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_rows": 0}, "num_rows"),
        ({"first_row": -1}, "first_row"),
        ({"sequence": -1}, "sequence"),
        ({"seq_len": 63}, "behind its sequence"),
        ({"pattern_rows": (0, 1, 2)}, "pattern_rows"),
        ({"pattern_rows": (-1,)}, "pattern_rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_windows_that_do_not_fit(changes: dict[str, Any], named: str) -> None:
    windows = [WINDOW, replace(WINDOW, **changes)]
    with pytest.raises(ValueError, match=named):
        WindowTiles.build(windows, 64, 4, "cpu")


def test_tiles_of_a_graph_that_is_too_small() -> None:
    windows = [Window(0, 65, 0, 1000, 0)]
    with pytest.raises(ValueError, match="num_tiles must be at least 2"):
        WindowTiles.build(windows, 64, 4, "cpu", num_tiles=1)
    with pytest.raises(ValueError, match="max_splits must be at least 4"):
        WindowTiles.build(windows, 64, 4, "cpu", max_splits=2)
    with pytest.raises(ValueError, match="block_size must be one of"):
        WindowTiles.build(windows, 48, 4, "cpu")
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        WindowTiles.build(windows, 64, 0, "cpu")


ARGUMENTS = {
    "q": lambda p: {"q": p.q.double()},
    "head_dim": lambda p: {"q": p.q[..., :24], "out": p.q[..., :24]},
    "k_pages": lambda p: {"k_pages": p.k_pages.double()},
    "v_pages": lambda p: {"v_pages": p.v_pages[:1]},
    "no multiple": lambda p: {"q": p.q[:, :3], "out": p.q[:, :3]},
    "multiple of the block size": lambda p: {
        "k_pages": p.k_pages[:, :48], "v_pages": p.v_pages[:, :48],
    },
    "block_table": lambda p: {"block_table": p.block_table.long()},
    "out": lambda p: {"out": p.q[:2]},
    "indices must be int16": lambda p: {"indices": p.indices.long()},
    "counts": lambda p: {"counts": p.counts.long()},
    "both be given": lambda p: {"counts": None},
    "to windows with patterns": lambda p: {"counts": None, "indices": None},
    "k_scale must be None": lambda p: {"k_scale": torch.ones(1)},
    "v_scale must be one float32": lambda p: {
        "k_pages": p.k_pages.to(FP8), "v_pages": p.v_pages.to(FP8), "k_scale": torch.ones(1),
        "v_scale": torch.ones(2),
    },
}  # fmt: skip


@pytest.mark.parametrize("named", ARGUMENTS)
def test_arguments_that_do_not_fit(named: str) -> None:
    problem = make_problem([(4, 10, 100)], gqa_ratio=2, num_kv_heads=2)
    arguments = {
        "q": problem.q, "k_pages": problem.k_pages, "v_pages": problem.v_pages,
        "block_table": problem.block_table, "tiles": problem.tiles(), **problem.common(),
        "out": torch.empty_like(problem.q),
    }  # fmt: skip
    with pytest.raises(ValueError, match=named):
        window_attention(**(arguments | ARGUMENTS[named](problem)))
