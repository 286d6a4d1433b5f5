"""The selection against sorting in plain Python: exact, also among equal scores."""

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from vllm_sparsed.kernels.block_selection import kept_columns, select_blocks
from vllm_sparsed.kernels.block_selection.reference import select_blocks_reference
from vllm_sparsed.kernels.block_selection.torch_path import select_blocks_torch
from vllm_sparsed.kernels.pattern_building import kept_blocks_bound

UNTOUCHED = -7
PATHS = [
    pytest.param("kernel", id="interpreter"),
    pytest.param("torch", id="torch_path"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]


def selected(
    importance: Tensor,
    generation: Tensor,
    select: float,
    path: str,
    index_dtype: torch.dtype = torch.int16,
) -> list[list[list[int]]]:
    """Index lists [head][row], after checking that nothing else in the store was written."""
    num_heads, num_blocks, _ = importance.shape
    first = num_blocks - generation.shape[2]
    width = kept_blocks_bound(num_blocks, generation.shape[2], select) + 3
    device = "cuda" if path == "cuda" else "cpu"
    # Every other slot, in reverse; one head of the store belongs to nobody.
    slots = torch.arange(2 * num_blocks - 1, 0, -2, dtype=torch.int32, device=device)
    store = torch.full(
        (2 * num_blocks, num_heads + 1, width), UNTOUCHED, dtype=index_dtype, device=device
    )
    counts = torch.full(
        (2 * num_blocks, num_heads + 1), UNTOUCHED, dtype=torch.int32, device=device
    )
    arguments = {
        "first_generation_block": first,
        "pattern_rows": slots,
        "indices": store[:, 1:],
        "counts": counts[:, 1:],
    }
    if path == "torch":
        select_blocks_torch(
            importance,
            generation,
            num_kept=kept_columns(num_blocks, select),
            num_kept_generation=kept_columns(num_blocks - first, select),
            **arguments,
        )
    else:
        if path == "kernel" and os.environ.get("TRITON_INTERPRET") != "1":
            pytest.fail("these tests run the Triton kernels on a CPU: set TRITON_INTERPRET=1")
        select_blocks(importance.to(device), generation.to(device), select=select, **arguments)
    store, counts, slots = store.cpu(), counts.cpu(), slots.cpu()
    assert (store[::2] == UNTOUCHED).all()
    assert (store[:, 0] == UNTOUCHED).all()
    assert (counts[::2] == UNTOUCHED).all()
    lists = []
    for head in range(num_heads):
        rows = []
        for slot in slots.tolist():
            count = int(counts[slot, head + 1])
            assert (store[slot, head + 1, count:] == UNTOUCHED).all()
            rows.append(store[slot, head + 1, :count].tolist())
        lists.append(rows)
    return lists


def expected(importance: Tensor, generation: Tensor, select: float) -> list[list[list[int]]]:
    first = importance.shape[1] - generation.shape[2]
    mask = select_blocks_reference(
        importance, generation, first_generation_block=first, select=select
    )
    return [[row.nonzero().flatten().tolist() for row in head] for head in mask]


def maps(kind: str, num_heads: int, num_blocks: int, first: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_blocks)
    shape = (num_heads, num_blocks, num_blocks)
    if kind == "random":
        scores = torch.rand((2, *shape), generator=generator) / 128
    elif kind == "ties":
        scores = torch.randint(0, 4, (2, *shape), generator=generator) / 3.0
    elif kind == "tiny":
        scores = torch.randint(0, 1000, (2, *shape), generator=generator) * 1e-42  # subnormal
    else:
        scores = torch.zeros((2, *shape))
    return scores[0].contiguous(), scores[1, :, :, first:].contiguous()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["random", "ties", "tiny", "zeros"])
@pytest.mark.parametrize(
    ("num_blocks", "first"),
    [
        pytest.param(1, 0, id="one_block"),
        pytest.param(5, 4, id="one_generation_block"),
        pytest.param(9, 0, id="all_generation"),
        pytest.param(17, 8, id="both"),
    ],
)
@pytest.mark.parametrize("select", [0.05, 0.3, 1.0])
def test_equals_reference(path: str, kind: str, num_blocks: int, first: int, select: float) -> None:
    scores = maps(kind, 2, num_blocks, first)
    assert selected(*scores, select, path) == expected(*scores, select)


@pytest.mark.parametrize("path", PATHS)
def test_rows_wider_than_the_smallest_variant(path: str) -> None:
    importance, generation = maps("ties", 1, 129, 100)
    lists = selected(importance, generation, 0.3, path, torch.int32)
    assert lists == expected(importance, generation, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [2049, 8192])
def test_widest_rows_on_gpu(num_blocks: int) -> None:
    """Against PyTorch's stable sort: too large for plain Python."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, num_blocks, num_blocks)
    importance = torch.randint(0, 3000, shape, generator=generator, device="cuda") / 3000
    generation = importance[:, :, num_blocks // 2 :].contiguous()
    width = kept_blocks_bound(num_blocks, generation.shape[2], 0.3)
    stores = []
    for run in (select_blocks, select_blocks_torch):
        indices = torch.full((num_blocks, 1, width), -1, dtype=torch.int16, device="cuda")
        counts = torch.zeros((num_blocks, 1), dtype=torch.int32, device="cuda")
        sizes = (
            {"select": 0.3}
            if run is select_blocks
            else {
                "num_kept": kept_columns(num_blocks, 0.3),
                "num_kept_generation": kept_columns(generation.shape[2], 0.3),
            }
        )
        run(
            importance,
            generation,
            first_generation_block=num_blocks // 2,
            pattern_rows=torch.arange(num_blocks, device="cuda"),
            indices=indices,
            counts=counts,
            **sizes,
        )
        stores.append((indices, counts))
    assert torch.equal(stores[0][0], stores[1][0])
    assert torch.equal(stores[0][1], stores[1][1])


@st.composite
def random_maps(draw: st.DrawFn) -> tuple[Tensor, Tensor, float]:
    num_blocks = draw(st.integers(1, 8))
    first = draw(st.integers(0, num_blocks - 1))
    score = st.sampled_from([0.0, 1e-45, 1e-30, 0.001, 0.25, 0.5, 1.0])
    numbers = st.lists(score, min_size=2 * num_blocks**2, max_size=2 * num_blocks**2)
    scores = torch.tensor(draw(numbers)).view(2, 1, num_blocks, num_blocks)
    select = draw(st.floats(0.01, 1.0))
    return scores[0].contiguous(), scores[1, :, :, first:].contiguous(), select


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=random_maps())
def test_properties(path: str, case: tuple[Tensor, Tensor, float]) -> None:
    importance, generation, select = case
    num_blocks, num_generation = importance.shape[1], generation.shape[2]
    first = num_blocks - num_generation
    lists = selected(importance, generation, select, path)
    assert lists == expected(importance, generation, select)
    for row, columns in enumerate(lists[0]):
        assert columns == sorted(set(columns))
        assert 1 <= len(columns) <= kept_blocks_bound(num_blocks, num_generation, select)
        generation_columns = [c - first for c in columns if c >= first]
        assert len(generation_columns) == kept_columns(num_generation, select)
        # The union: each part's columns are exactly those of a selection by its own scores.
        dropped = set(range(num_generation)) - set(generation_columns)
        scores = generation[0, row]
        assert not dropped or scores[list(dropped)].max() <= scores[generation_columns].min()
        prefill = [c for c in columns if c < first]
        scores = importance[0, row]
        beaten = [sum(s > scores[c] for s in scores) for c in prefill]
        assert all(b < kept_columns(num_blocks, select) for b in beaten)
    if select == 1.0:
        assert lists[0] == [list(range(num_blocks))] * num_blocks


@pytest.mark.parametrize("path", PATHS)
def test_not_a_number_keeps_the_counts(path: str) -> None:
    """A profiling run may hold anything: lists must stay in bounds."""
    importance = torch.full((1, 20, 20), float("nan"))
    lists = selected(importance, importance[:, :, 10:].contiguous(), 0.3, path)
    for columns in lists[0]:
        assert columns == sorted(set(columns))
        assert set(columns) <= set(range(20))
        assert len(columns) <= kept_blocks_bound(20, 10, 0.3)


@pytest.mark.parametrize(
    ("columns", "select", "kept"),
    [(10, 0.3, 4), (10, 0.05, 1), (1, 0.3, 1), (10, 1.0, 10), (10, 0.95, 10), (100, 0.29, 29)],
)
def test_kept_columns(columns: int, select: float, kept: int) -> None:
    """100 * 0.29 is 28.999... in floating point, so 28 + 1."""
    assert kept_columns(columns, select) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"importance": torch.zeros((1, 4, 5))}, "importance", id="map"),
        pytest.param({"generation_importance": torch.zeros((1, 4, 3))}, "generation_", id="part"),
        pytest.param({"first_generation_block": 4}, "first_generation_block", id="boundary"),
        pytest.param({"select": 0.0}, "select", id="none"),
        pytest.param({"select": 1.5}, "select", id="too_much"),
        pytest.param(
            {"pattern_rows": torch.zeros(3, dtype=torch.int32)}, "pattern_rows", id="slots"
        ),
        pytest.param({"indices": torch.zeros((4, 1, 4))}, "indices", id="index_dtype"),
        pytest.param(
            {"indices": torch.zeros((4, 1, 2), dtype=torch.int16)}, "at least 3", id="narrow"
        ),
        pytest.param({"counts": torch.zeros((4, 2), dtype=torch.int32)}, "counts", id="counts"),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    arguments = {
        "importance": torch.zeros((1, 4, 4)),
        "generation_importance": torch.zeros((1, 4, 2)),
        "first_generation_block": 2,
        "select": 0.3,
        "pattern_rows": torch.arange(4),
        "indices": torch.zeros((4, 1, 4), dtype=torch.int16),
        "counts": torch.zeros((4, 1), dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        select_blocks(**(arguments | change))
