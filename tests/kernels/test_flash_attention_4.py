"""FlashAttention 4 for single requests: its lists, what it declines, and on a GPU its results.

Without a GPU a stand-in reads the lists as FlashAttention 4 does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_block_sparse_attention import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    Problem,
    assert_accurate,
    make_problem,
    name_of,
    run,
)
from vllm_sparsed.kernels.block_sparse_attention import QueryTiles, flash_attention_4
from vllm_sparsed.kernels.block_sparse_attention.flash_attention_4 import (
    BLOCK_SIZE,
    HEAD_DIM,
    gather_lists,
)


def each_request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    tiles: QueryTiles,
    *,
    scale: float,
    out: Tensor,
) -> Tensor:
    """All requests of a batch, one call each, as the engine makes them."""
    first_rows = torch.nonzero(tiles.query_block == 0).flatten().tolist()
    for first, end in zip(first_rows, [*first_rows[1:], tiles.num_rows], strict=True):
        start = int(tiles.seq_start[first])
        span = slice(start, start + int(tiles.seq_len[first]))
        flash_attention_4.flash_attention_4(
            q[span], k[span], v[span], indices, counts, tiles.pattern_row[first:end],
            scale=scale, out=out[span],
        )  # fmt: skip
    return out


def problem_of(lengths: list[int], dtype: torch.dtype, device: str, **options: Any) -> Problem:
    return make_problem(
        lengths, block_size=BLOCK_SIZE, head_dim=HEAD_DIM, dtype=dtype, device=device, **options
    )


# Lists and declining, without a GPU.


@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (7, 7), (9, 4)], ids=lambda x: f"{x}")
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=name_of)
def test_lists_of_scattered_rows(
    index_dtype: torch.dtype, rows: int, width: int, where: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(rows)
    slots, heads = rows + 4, 3
    # Some heads of a store with more, so that no stride is the contiguous one.
    shape = (slots, heads + 2, width)
    store = torch.randint(0, 30000, shape, generator=generator).to(index_dtype)[:, 1:-1].to(device)
    most = min(rows, width)
    counts = torch.randint(0, most + 1, (slots, heads), generator=generator).int().to(device)
    counts[:, 0] = most
    pattern_rows = torch.randperm(slots, generator=generator)[:rows].int().to(device)
    lists, num_kept = gather_lists(store, counts, pattern_rows)
    assert lists.shape == (1, heads, rows, most)
    assert lists.dtype == num_kept.dtype == torch.int32
    assert lists.is_contiguous() and num_kept.is_contiguous()
    assert num_kept[0].eq(0).all()
    assert num_kept[1, 0].tolist() == counts[pattern_rows.long()].T.tolist()
    for row, slot in enumerate(pattern_rows.tolist()):
        for head in range(heads):
            count = int(counts[slot, head])
            assert lists[0, head, row, :count].tolist() == store[slot, head, :count].tolist()


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"dtype": FLOAT16}, True),
        ({"dtype": FLOAT32}, False),
        ({"head_dim": 64}, False),
        ({"block_size": 64}, False),
        ({"capability": (8, 9)}, False),
        ({"capability": (10, 0)}, False),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_what_it_declines(changes: dict[str, Any], served: bool) -> None:
    served_case: dict[str, Any] = {
        "head_dim": 128, "dtype": BFLOAT16, "block_size": 128, "capability": (9, 0),
    }  # fmt: skip
    assert flash_attention_4.serves(**(served_case | changes)) == served


@pytest.mark.parametrize("missing", ["", "vllm", "interface", "cutlass", "quack"])
def test_installed_only_with_all_that_it_compiles_with(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interface = tmp_path / "vllm_flash_attn" / "cute" / "interface.py"
    interface.parent.mkdir(parents=True)
    if missing != "interface":
        interface.touch()

    def find_spec(name: str) -> ModuleSpec | None:
        found = ModuleSpec(name, None, origin=str(tmp_path / "__init__.py"))
        return None if name == missing else found

    monkeypatch.setattr(flash_attention_4, "find_spec", find_spec)
    assert flash_attention_4.installed() == (not missing)


def stand_in(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, pack_gqa: bool,
    num_splits: int, block_sparse_tensors: Any, out: Tensor,
) -> None:  # fmt: skip
    """Goes through lists from their ends, and masks keys in the first block it meets alone."""
    lists = block_sparse_tensors
    (_, length, heads, dim), kv_heads = q.shape, k.shape[2]
    blocks = -(-length // BLOCK_SIZE)
    assert not causal and not pack_gqa and num_splits == 1 and lists.block_size == (128, 128)
    assert out.shape == q.shape and k.shape == v.shape == (1, length, kv_heads, dim)
    for counts, indices in (
        (lists.mask_block_cnt, lists.mask_block_idx),
        (lists.full_block_cnt, lists.full_block_idx),
    ):
        assert counts.shape == (1, heads, blocks) and counts.dtype == torch.int32
        assert indices.shape[:3] == counts.shape and indices.dtype == torch.int32
        assert indices.shape[3] <= blocks and indices.stride(3) == counts.stride(2) == 1
    assert lists.mask_block_cnt.eq(0).all()
    for head in range(heads):
        for row in range(blocks):
            count = int(lists.full_block_cnt[0, head, row])
            kept = lists.full_block_idx[0, head, row, :count].tolist()
            spans = [torch.arange(b * BLOCK_SIZE, (b + 1) * BLOCK_SIZE) for b in kept]
            spans[-1] = spans[-1][spans[-1] < length]
            keys, queries = torch.cat(spans), slice(row * BLOCK_SIZE, (row + 1) * BLOCK_SIZE)
            kv_head = head * kv_heads // heads
            scores = q[0, queries, head].float() @ k[0, keys, kv_head].float().T * softmax_scale
            result = scores.softmax(-1) @ v[0, keys, kv_head].float()
            out[0, queries, head] = result.to(out.dtype)


@pytest.fixture
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_4, "_interface", lambda: (stand_in, SimpleNamespace))


@pytest.mark.usefixtures("standing_in")
@pytest.mark.parametrize("gqa_ratio", [1, 7])
@pytest.mark.parametrize("lengths", [[1], [128], [129, 63], [1000, 5, 300]], ids=str)
def test_requests_as_it_is_told_of_them(lengths: list[int], gqa_ratio: int, device: str) -> None:
    problem = problem_of(lengths, FLOAT16, device, gqa_ratio=gqa_ratio, num_kv_heads=2)
    assert_accurate(run(each_request, problem), problem)


def test_tensors_that_do_not_fit(device: str) -> None:
    problem = problem_of([300], FLOAT16, device)
    (span,) = problem.requests
    q, k, v = (x[span] for x in (problem.q, problem.k, problem.v))
    indices, counts, slots = problem.indices, problem.counts, problem.tiles.pattern_row
    attend: Callable[..., Tensor] = flash_attention_4.flash_attention_4
    with pytest.raises(ValueError, match=r"pattern_rows must be \[3\]"):
        attend(q, k, v, indices, counts, slots[:2], scale=1.0, out=q)
    with pytest.raises(ValueError, match=r"indices must be \[pattern rows, 1, width\]"):
        attend(q, k, v, indices.repeat(1, 2, 1), counts, slots, scale=1.0, out=q)


def check_on(device: str, dtype: torch.dtype, heads: tuple[int, int] = (4, 2)) -> None:
    flash_attention_4.check(*heads, dtype, width=9, index_dtype=torch.int16, device=device)


@pytest.mark.usefixtures("standing_in")
def test_the_check_passes_where_results_agree(device: str) -> None:
    check_on(device, FLOAT16)


def test_the_check_finds_a_last_block_that_is_not_masked(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmasked(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
        # Zeros behind the end of the sequence, as a tile that reaches beyond its tensor has them.
        missing = -q.shape[1] % BLOCK_SIZE
        padded = [torch.cat([x, x.new_zeros(1, missing, *x.shape[2:])], 1) for x in (q, k, v)]
        out = torch.zeros_like(padded[0])
        stand_in(*padded, **(options | {"out": out}))
        options["out"].copy_(out[:, : q.shape[1]])

    monkeypatch.setattr(flash_attention_4, "_interface", lambda: (unmasked, SimpleNamespace))
    with pytest.raises(RuntimeError, match="differs by"):
        check_on(device, FLOAT16)


# On a GPU.


@pytest.fixture
def fa4(device: str) -> Any:
    """FlashAttention 4's forward; skips where it does not serve."""
    capability = torch.cuda.get_device_capability(device)
    if not flash_attention_4.serves(HEAD_DIM, BFLOAT16, BLOCK_SIZE, capability):
        pytest.skip(f"FlashAttention 4 is used on compute capability 9.0, not {capability}")
    if not flash_attention_4.installed():
        pytest.skip("FlashAttention 4 is not installed (nvidia-cutlass-dsl, quack-kernels)")
    try:
        forward, _ = flash_attention_4._interface()
    except Exception as error:
        pytest.skip(f"FlashAttention 4 cannot be imported: {error}")
    return forward


@pytest.mark.gpu
@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("heads", [(1, 1), (1, 4), (7, 1), (7, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=name_of)
@pytest.mark.parametrize(
    "lengths", [[128], [1, 63], [129, 1000, 4097], [2048, 127, 255, 385]], ids=str
)
def test_ragged_requests_and_batches(
    lengths: list[int], dtype: torch.dtype, heads: tuple[int, int], device: str
) -> None:
    """NaN lies before, between and behind the requests."""
    gqa_ratio, num_kv_heads = heads
    problem = problem_of(lengths, dtype, device, gqa_ratio=gqa_ratio, num_kv_heads=num_kv_heads)
    assert_accurate(run(each_request, problem), problem)


@pytest.mark.gpu
@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize(
    "keep", [lambda n: 1, lambda n: min(n, 2), lambda n: n], ids=["1", "2", "all"]
)
@pytest.mark.parametrize("length", [129, 1000, 4097])
def test_lists_of_extreme_lengths(length: int, keep: Callable[[int], int], device: str) -> None:
    problem = problem_of([length], BFLOAT16, device, num_kv_heads=4, keep=keep)
    assert_accurate(run(each_request, problem), problem)


@pytest.mark.gpu
@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("gqa_ratio", [1, 7])
def test_the_same_bits_alone_and_in_a_batch(gqa_ratio: int, device: str) -> None:
    """Other requests beside it, other tokens before it, other rows of the store, another width."""
    alone = problem_of([2600], BFLOAT16, device, gqa_ratio=gqa_ratio, num_kv_heads=4)
    batch = problem_of([700, 2600, 4096], BFLOAT16, device, gqa_ratio=gqa_ratio, num_kv_heads=4)
    (single,), (_, span, _) = alone.requests, batch.requests
    rows = -(-2600 // BLOCK_SIZE)
    first = -(-700 // BLOCK_SIZE)
    for name in ("q", "k", "v"):
        getattr(batch, name)[span] = getattr(alone, name)[single]
    slots = batch.tiles.pattern_row[first : first + rows].long()
    own = alone.tiles.pattern_row.long()
    batch.indices[slots, :, :rows] = alone.indices[own]
    batch.counts[slots] = alone.counts[own]
    expected = run(each_request, alone)[single]
    for _ in range(5):
        assert torch.equal(run(each_request, batch)[span], expected)


def call_of(problem: Problem, out: Tensor) -> Callable[[], Tensor]:
    """One call for a problem of one request, with nothing for the host to wait for."""
    (span,) = problem.requests
    q, k, v = (x[span] for x in (problem.q, problem.k, problem.v))
    return lambda: flash_attention_4.flash_attention_4(
        q, k, v, problem.indices, problem.counts, problem.tiles.pattern_row,
        scale=problem.scale, out=out,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("gqa_ratio", [1, 7])
def test_recorded_in_a_cuda_graph(gqa_ratio: int, device: str) -> None:
    """A replay works on what tensors, lists and row slots hold by then."""
    options = {"gqa_ratio": gqa_ratio, "num_kv_heads": 4}
    first, second = (problem_of([1000], BFLOAT16, device, seed=seed, **options) for seed in (1, 2))
    out = torch.zeros(1000, 4 * gqa_ratio, HEAD_DIM, dtype=BFLOAT16, device=device)
    expected = [call_of(x, out)().clone() for x in (first, second)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call_of(first, out)()
    for problem, result in zip((first, second), expected, strict=True):
        for name in ("q", "k", "v", "indices", "counts"):
            getattr(first, name).copy_(getattr(problem, name))
        first.tiles.pattern_row.copy_(problem.tiles.pattern_row)
        out.zero_()
        graph.replay()
        assert torch.equal(out, result)


@pytest.mark.gpu
def test_compiles_once_and_copies_nothing(fa4: Any, device: str) -> None:
    """After the check: any length, width, offset and number of heads of this ratio."""
    check_on(device, BFLOAT16, (8, 4))
    compiled = len(fa4.compile_cache.cache)
    for length, kv_heads in ((1, 4), (128, 4), (5000, 4), (8192, 2), (8191, 1)):
        problem = problem_of([length], BFLOAT16, device, gqa_ratio=2, num_kv_heads=kv_heads)
        out = torch.empty(length, 2 * kv_heads, HEAD_DIM, dtype=BFLOAT16, device=device)
        call = call_of(problem, out)
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows = -(-length // BLOCK_SIZE)
        lists = 4 * 2 * kv_heads * rows * (rows + 2)
        assert torch.cuda.max_memory_allocated() - before <= lists + 2048
    assert len(fa4.compile_cache.cache) == compiled


@pytest.mark.gpu
@pytest.mark.usefixtures("fa4")
@pytest.mark.parametrize("heads", [(32, 32), (28, 4), (7, 1), (4, 4)], ids=str)
def test_the_check_passes_for_the_shapes_of_models_and_their_shards(
    heads: tuple[int, int], device: str
) -> None:
    with torch.inference_mode():  # as the engine's start calls it
        check_on(device, BFLOAT16, heads)
