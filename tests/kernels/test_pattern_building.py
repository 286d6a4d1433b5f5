"""Whole patterns against the reference, the bounds by brute force, and memory on the GPU."""

import itertools
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from vllm_sparsed.kernels.block_importance.reference import block_importance_reference
from vllm_sparsed.kernels.block_selection import kept_columns
from vllm_sparsed.kernels.pattern_building import (
    build_pattern,
    driver,
    generation_start_block,
    kept_blocks_bound,
    pattern_width,
    warm_up,
)

FLOAT16, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32

# length, canvas, block size, query heads, key heads, head_dim, dtype, select
CASES = [
    (1, 1, 128, 2, 1, 64, FLOAT32, 0.3),
    (63, 20, 16, 7, 1, 32, FLOAT16, 0.05),
    (129, 1, 64, 2, 2, 64, FLOAT16, 1.0),
    (129, 129, 32, 8, 1, 16, FLOAT32, 0.3),
    (400, 170, 32, 2, 1, 64, FLOAT16, 0.3),
    (300, 300, 16, 2, 1, 64, FLOAT16, 0.5),
]
ON_GPU = [
    (length, max(1, round(length * share)), block_size, 8, kv_heads, 128, dtype, select)
    for (length, share), (block_size, dtype), (kv_heads, select) in itertools.product(
        [(63, 0.5), (1000, 0.0), (1000, 1.0), (4097, 0.3)],
        itertools.product((16, 32, 64, 128), (BFLOAT16, FLOAT32)),
        [(1, 0.3), (8, 0.05), (4, 1.0)],
    )
]


def name(case: tuple) -> str:
    length, canvas, block_size, heads, kv_heads, head_dim, dtype, select = case
    return (
        f"L{length}-G{canvas}-b{block_size}-h{heads}on{kv_heads}-d{head_dim}-"
        f"{str(dtype).removeprefix('torch.')}-s{select}"
    )


def assert_top(scores: Tensor, kept: Tensor, expected: Tensor) -> None:
    """kept equals expected but for columns whose scores tie with others within rounding."""
    assert torch.equal(kept.sum(dim=-1), expected.sum(dim=-1)), "counts differ"
    for head, row in (kept != expected).any(dim=-1).nonzero().tolist():
        swapped = scores[head, row][kept[head, row] != expected[head, row]]
        assert swapped.max() - swapped.min() <= 3e-6 * swapped.max(), (head, row, swapped)


def top_mask(scores: Tensor, select: float) -> Tensor:
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    kept = order[:, :, : kept_columns(scores.shape[-1], select)]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, kept, True)


def built(case: tuple, device: str, lse: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """The pattern as a mask [heads, n, n], checked to be ascending lists."""
    length, canvas, block_size, heads, _, head_dim, _, select = case
    num_blocks = -(-length // block_size)
    first = generation_start_block(length, canvas, block_size)
    width = kept_blocks_bound(num_blocks, num_blocks - first, select)
    slots = torch.randperm(num_blocks + 5)[:num_blocks].to(device, torch.int32)
    indices = torch.full(
        (num_blocks + 5, heads, width), num_blocks, dtype=torch.int16, device=device
    )
    counts = torch.zeros((num_blocks + 5, heads), dtype=torch.int32, device=device)
    build_pattern(
        q,
        k,
        canvas_len=canvas,
        block_size=block_size,
        select=select,
        scale=head_dim**-0.5,
        lse=lse,
        pattern_rows=slots,
        indices=indices,
        counts=counts,
    )
    rows = indices[slots.long()].transpose(0, 1).cpu().long()  # [heads, n, width]
    valid = torch.arange(width) < counts[slots.long()].T.cpu().unsqueeze(-1)
    assert ((rows.diff(dim=-1) > 0) | ~valid[:, :, 1:]).all()
    mask = torch.zeros((heads, num_blocks, num_blocks + 1), dtype=torch.bool)
    mask.scatter_(-1, torch.where(valid, rows, num_blocks), True)
    return mask[:, :, :num_blocks]


def random_qk(case: tuple, device: str) -> tuple[Tensor, Tensor]:
    length, _, _, heads, kv_heads, head_dim, dtype, _ = case
    generator = torch.Generator().manual_seed(length)
    q = 2 * torch.randn((length, heads, head_dim), generator=generator)
    k = torch.randn((length, kv_heads, head_dim), generator=generator)
    return q.to(device, dtype), k.to(device, dtype)


def check_pattern(case: tuple, device: str, lse_given: bool) -> None:
    length, canvas, block_size, heads, kv_heads, head_dim, _, select = case
    q, k = random_qk(case, device)
    first = generation_start_block(length, canvas, block_size)
    importance, generation = block_importance_reference(
        q.double(),
        k.double(),
        first_generation_block=first,
        block_size=block_size,
        scale=head_dim**-0.5,
    )
    importance, generation = importance.cpu(), generation.cpu()
    lse = None
    if lse_given:
        keys = k.double().repeat_interleave(heads // kv_heads, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * head_dim**-0.5
        lse = scores.logsumexp(dim=-1).float()
    mask = built(case, device, lse, q, k)
    if select == 1.0:
        assert mask.all()
    assert_top(generation, mask[:, :, first:], top_mask(generation, select))
    # A tie across the boundary of the parts may change how many prefill columns are kept.
    kept, expected = mask[:, :, :first], top_mask(importance, select)[:, :, :first]
    for head, row in (kept != expected).any(dim=-1).nonzero().tolist():
        threshold = (
            importance[head, row]
            .sort(descending=True)
            .values[kept_columns(importance.shape[2], select) - 1]
        )
        swapped = importance[head, row, :first][kept[head, row] != expected[head, row]]
        assert (swapped - threshold).abs().max() <= 3e-6 * threshold, (head, row, swapped)


@pytest.fixture
def interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("these tests run the Triton kernels on a CPU: set TRITON_INTERPRET=1")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("lse_given", [True, False], ids=["lse", "nolse"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_kernels_in_interpreter(case: tuple, lse_given: bool) -> None:
    check_pattern(case, "cpu", lse_given)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_torch_path(case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_pattern(case, "cpu", False)


@pytest.mark.gpu
@pytest.mark.parametrize("lse_given", [True, False], ids=["lse", "nolse"])
@pytest.mark.parametrize("case", ON_GPU, ids=name)
def test_kernels_on_gpu(case: tuple, lse_given: bool) -> None:
    check_pattern(case, "cuda", lse_given)


@pytest.mark.gpu
def test_memory_and_no_synchronisation_on_gpu() -> None:
    """64k tokens in blocks of 32: temporaries under 1 GiB, and the host never waits."""
    length, heads = 65536, 32
    num_blocks = length // 32
    q = torch.randn((length, heads, 64), dtype=BFLOAT16, device="cuda")
    k = torch.randn((length, 4, 64), dtype=BFLOAT16, device="cuda")
    width = pattern_width(num_blocks, 256, 0.3)
    indices = torch.empty((num_blocks, heads, width), dtype=torch.int16, device="cuda")
    counts = torch.empty((num_blocks, heads), dtype=torch.int32, device="cuda")
    slots = torch.arange(num_blocks, dtype=torch.int32, device="cuda")
    warm_up(heads, 4, 64, BFLOAT16, [32], device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        build_pattern(
            q,
            k,
            canvas_len=8192,
            block_size=32,
            select=0.3,
            scale=0.125,
            lse=None,
            pattern_rows=slots,
            indices=indices,
            counts=counts,
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**30
    expected = kept_columns(256, 0.3)
    generation = (indices >= num_blocks - 256) & (
        torch.arange(width, device="cuda") < counts.unsqueeze(-1)
    )
    assert (generation.sum(dim=-1) == expected).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 14])
@pytest.mark.parametrize("map_bytes", [1, 6000, 50_000])
def test_head_chunks_do_not_matter(
    kv_heads: int, map_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = (300, 90, 16, 14, kv_heads, 16, FLOAT32, 0.3)
    q, k = random_qk(case, "cpu")
    whole = built(case, "cpu", None, q, k)
    monkeypatch.setattr(driver, "MAP_BYTES", map_bytes)
    assert torch.equal(built(case, "cpu", None, q, k), whole)


@given(kv_heads=st.integers(1, 40), group=st.integers(1, 16), largest=st.integers(1, 99))
def test_head_chunks_keep_groups_together(kv_heads: int, group: int, largest: int) -> None:
    chunks = list(driver.head_chunks(kv_heads * group, group, largest))
    assert [h for c in chunks for h in range(c.start, c.stop)] == list(range(kv_heads * group))
    for chunk in chunks:
        assert chunk.stop - chunk.start <= largest
        whole_groups = chunk.start % group == 0 and chunk.stop % group == 0
        assert whole_groups or chunk.start // group == (chunk.stop - 1) // group


@settings(max_examples=300)
@given(
    seq_len=st.integers(1, 5000), share=st.floats(0, 1), block_size=st.sampled_from([16, 32, 128])
)
def test_generation_start_block(seq_len: int, share: float, block_size: int) -> None:
    """The definition, searched from the left."""
    canvas_len = max(1, round(seq_len * share))
    num_blocks = -(-seq_len // block_size)
    starts = [i for i in range(num_blocks) if seq_len - i * block_size <= canvas_len]
    expected = starts[0] if starts else num_blocks - 1
    assert generation_start_block(seq_len, canvas_len, block_size) == expected


@pytest.mark.parametrize("select", [0.05, 0.1, 0.3, 1 / 3, 0.5, 0.7, 0.95, 1.0])
def test_pattern_width_is_exact(select: float) -> None:
    for max_num_blocks, max_canvas in itertools.product(range(1, 25), range(1, 28)):
        largest = max(
            kept_blocks_bound(blocks, generation, select)
            for blocks in range(1, max_num_blocks + 1)
            for generation in range(1, min(blocks, max_canvas) + 1)
        )
        assert pattern_width(max_num_blocks, max_canvas, select) == largest


@pytest.mark.parametrize(
    ("blocks", "generation", "select", "bound"),
    [
        (512, 64, 0.3, 154 + 20),
        (15, 2, 0.3, 5 + 1),
        (4, 1, 1.0, 4),
        (4, 4, 0.05, 1),
        (1, 1, 0.5, 1),
    ],
)
def test_kept_blocks_bound(blocks: int, generation: int, select: float, bound: int) -> None:
    assert kept_blocks_bound(blocks, generation, select) == bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"canvas_len": 0}, "canvas_len", id="no_canvas"),
        pytest.param({"canvas_len": 41}, "canvas_len", id="canvas_too_long"),
        pytest.param({"lse": torch.zeros((2, 40))}, "lse", id="lse"),
        pytest.param({"block_size": 20}, "block_size", id="block_size"),
        pytest.param({"indices": torch.zeros((3, 2, 3)).short()}, "indices", id="heads"),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros((40, 4, 16)),
        "k": torch.zeros((40, 2, 16)),
        "canvas_len": 10,
        "block_size": 16,
        "select": 0.3,
        "scale": 0.25,
        "lse": None,
        "pattern_rows": torch.arange(3),
        "indices": torch.zeros((3, 4, 3), dtype=torch.int16),
        "counts": torch.zeros((3, 4), dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        build_pattern(**(arguments | change))
