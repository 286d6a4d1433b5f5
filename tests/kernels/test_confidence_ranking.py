"""Which rows are unmasked, against sorting in plain Python: exact, also among equals."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from vllm_sparsed.kernels.confidence_ranking import RankedRows, decide_rows
from vllm_sparsed.kernels.confidence_ranking.reference import decide_rows_reference
from vllm_sparsed.kernels.confidence_ranking.torch_path import decide_rows_torch
from vllm_sparsed.kernels.confidence_ranking.wrapper import MAX_KERNEL_ROWS

PATHS = [
    pytest.param("kernel", id="interpreter"),
    pytest.param("torch", id="torch_path"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]


def decided(
    path: str,
    confidence: Tensor,
    lengths: list[int],
    counts: list[int],
    passes: list[bool] | None = None,
    order: list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """What the path decides, and what the reference does."""
    device = "cuda" if path == "cuda" else "cpu"
    candidates = torch.arange(len(confidence)) * 7 + 3
    first_row = torch.tensor([0, *lengths]).cumsum(0)
    expected = decide_rows_reference(
        candidates.tolist(), confidence.tolist(), first_row.tolist(), counts, passes
    )
    if path == "torch":
        result = decide_rows_torch(
            candidates,
            confidence,
            torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
            first_row,
            torch.tensor(counts),
            None if passes is None else torch.tensor(passes),
        )
        return result.tolist(), expected
    chance: dict[str, Tensor] = {}
    if passes is not None:
        chance["uniforms"] = torch.where(torch.tensor(passes), 0.25, 0.75).double().to(device)
        chance["probability"] = torch.full((len(lengths),), 0.5).double().to(device)
    request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    rows = RankedRows(
        request=request.to(device),
        first_row=first_row.to(device),
        num_to_unmask=torch.tensor(counts).to(device),
        order=None if order is None else torch.tensor(order).to(device),
    )
    result = decide_rows(candidates.to(device), confidence.to(device), rows, **chance).tolist()
    return (result if order is None else [result[place] for place in order]), expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [
        pytest.param([1], [1], id="one_row"),
        pytest.param([63], [5], id="one_request"),
        pytest.param([1, 111, 2, 300], [0, 17, 2, 299], id="several"),
        pytest.param([700], [1000], id="all_of_them"),
    ],
)
def test_equals_reference(
    path: str, dtype: torch.dtype, kind: str, lengths: list[int], counts: list[int]
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths),)
    confidence = {
        "random": torch.rand(shape, generator=generator),
        "ties": torch.randint(-2, 3, shape, generator=generator) / 3.0,
        "zeros": torch.zeros(shape),
    }[kind].to(dtype)
    found, expected = decided(path, confidence, lengths, counts)
    assert found == expected
    assert sum(token >= 0 for token in found) == sum(
        min(a, b) for a, b in zip(lengths, counts, strict=True)
    )


@pytest.mark.parametrize("path", PATHS)
def test_not_a_number_and_infinities(path: str) -> None:
    inf, nan = float("inf"), float("nan")
    confidence = torch.tensor([0.5, -inf, nan, inf, -inf, nan, 0.5])
    for count in range(8):
        found, expected = decided(path, confidence, [7], [count])
        # Infinity and NaN are equal to the kernel, so that the first of them wins.
        assert sum(token >= 0 for token in found) == count
        if path == "torch" or count not in (1, 2):
            assert found == expected


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int], list[bool], list[int]]:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    total = sum(lengths)
    counts = [draw(st.integers(0, length + 1)) for length in lengths]
    score = st.sampled_from([-1.5, 0.0, 1e-30, 0.25, 0.5])
    confidence = torch.tensor(draw(st.lists(score, min_size=total, max_size=total)))
    passes = draw(st.lists(st.booleans(), min_size=total, max_size=total))
    order = draw(st.permutations(range(total)))
    return confidence, lengths, counts, passes, list(order)


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=cases())
def test_chance_and_order(path: str, case: tuple) -> None:
    found, expected = decided(path, *case)
    assert found == expected


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [MAX_KERNEL_ROWS, 65536])
def test_a_long_canvas_on_gpu(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 900, (num_rows,), generator=generator) / 900
    order = torch.randperm(num_rows, generator=generator).tolist()
    passes = (torch.rand(num_rows, generator=generator) < 0.5).tolist()
    found, expected = decided("cuda", confidence, [num_rows], [num_rows // 3], passes, order)
    assert found == expected


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    rows = RankedRows(
        request=empty, first_row=torch.zeros(1, dtype=torch.int64), num_to_unmask=empty
    )
    assert decide_rows(empty, torch.empty(0), rows).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"confidence": torch.zeros(4).half()}, "confidence must", id="dtype"),
        pytest.param({"candidates": torch.zeros(4)}, "candidates must", id="candidates"),
        pytest.param({"uniforms": torch.zeros(4).double()}, "go together", id="half"),
        pytest.param(
            {"uniforms": torch.zeros(4), "probability": torch.zeros(1).double()},
            "uniforms must",
            id="uniforms",
        ),
        pytest.param(
            {
                "rows": RankedRows(
                    request=torch.zeros(4, dtype=torch.int64),
                    first_row=torch.zeros(4, dtype=torch.int64),
                    num_to_unmask=torch.zeros(1, dtype=torch.int64),
                )
            },
            "rows.first_row must",
            id="bounds",
        ),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    arguments = {
        "candidates": torch.zeros(4, dtype=torch.int64),
        "confidence": torch.zeros(4),
        "rows": RankedRows(
            request=torch.zeros(4, dtype=torch.int64),
            first_row=torch.tensor([0, 4]),
            num_to_unmask=torch.zeros(1, dtype=torch.int64),
        ),
    }
    with pytest.raises(ValueError, match=message):
        decide_rows(**(arguments | change))
