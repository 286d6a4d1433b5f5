"""Candidates and statistics against plain PyTorch in float64; random numbers against Python's."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random import uniform_rows
from vllm_sparsed.kernels.counter_random.reference import uniform_reference
from vllm_sparsed.kernels.token_confidence import Draw, Statistic, token_confidence
from vllm_sparsed.kernels.token_confidence.reference import token_confidence_reference

DEVICES = [
    pytest.param("cpu", id="interpreter"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 63), (2, 5000), (3, 9001)]


def random_logits(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    """Rows of which the first elements are part of a wider matrix; few distinct values: ties."""
    rows, vocab = shape
    generator = torch.Generator().manual_seed(vocab)
    wide = torch.randint(-160, 160, (rows, vocab + 5), generator=generator) / 16
    return wide.to(dtype).to(device)[:, :vocab]


def coordinates(rows: int, device: str) -> dict[str, Tensor]:
    """Also the extremes of int64."""
    seeds = torch.tensor([-(2**63), 2**63 - 1, 7])[:rows]
    steps = torch.arange(rows) + 3
    positions = torch.tensor([65535, 0, 12])[:rows]
    return {
        "seed": seeds.to(device),
        "step": steps.to(device),
        "position": positions.to(device),
    }


def gumbel_noise(at: dict[str, Tensor], vocab: int, stream: int) -> Tensor:
    rows = zip(*(x.tolist() for x in at.values()), strict=True)
    uniforms = [
        [uniform_reference(seed, step, position, stream, column) for column in range(vocab)]
        for seed, step, position in rows
    ]
    return torch.tensor([[-math.log(-math.log(u)) for u in row] for row in uniforms]).double()


def assert_statistic(values: Tensor, exact: Tensor, logits: Tensor, statistic: Statistic) -> None:
    """As exact as float32 sums of the vocabulary are."""
    assert values.dtype == torch.float32
    # Entropies are as large as log(vocab), the others at most 1.
    bound = (
        2e-6 if statistic != Statistic.NEGATIVE_ENTROPY else 4e-6 * math.log(logits.shape[1] + 1)
    )
    assert (values.cpu().double() - exact).abs().max() <= bound + 1e-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "statistic"),
    [
        pytest.param(shape, statistic, id=f"{shape}-{statistic.name}")
        for shape, statistic in itertools.product(SHAPES, Statistic)
        if statistic != Statistic.MARGIN or shape[1] > 1  # a margin needs two tokens
    ],
)
def test_argmax(
    device: str, dtype: torch.dtype, shape: tuple[int, int], statistic: Statistic
) -> None:
    logits = random_logits(shape, dtype, device)
    candidates, values = token_confidence(logits, statistic)
    _, exact = token_confidence_reference(logits.cpu().double(), statistic)
    # The first of equals, which argmax does not promise.
    first = (logits.cpu() == logits.cpu().amax(dim=1, keepdim=True)).int().argmax(dim=1)
    assert torch.equal(candidates.cpu(), first)
    assert_statistic(values, exact, logits, statistic)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("statistic", Statistic)
@pytest.mark.parametrize("shape", [(3, 63), (2, 2100)], ids=str)
def test_drawn(device: str, scales: bool, statistic: Statistic, shape: tuple[int, int]) -> None:
    logits = random_logits(shape, torch.float32, device)
    at = coordinates(shape[0], device)
    temperature = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)[: shape[0]]
    draw = Draw(temperature=temperature.to(device), **at, stream=2)
    candidates, values = token_confidence(logits, statistic, draw, shaped=scales)
    noise = gumbel_noise(at, shape[1], stream=2) * temperature[:, None]
    expected, exact = token_confidence_reference(
        logits.cpu().double(), statistic, noise, temperature if scales else None
    )
    assert torch.equal(candidates.cpu(), expected)
    assert not torch.equal(expected, logits.cpu().argmax(dim=1))
    assert_statistic(values, exact, logits, statistic)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("drawn", [False, True], ids=["argmax", "drawn"])
@pytest.mark.parametrize("shaped", [False, True], ids=["plain", "shaped"])
@pytest.mark.parametrize("statistic", Statistic)
def test_cut(device: str, drawn: bool, shaped: bool, statistic: Statistic) -> None:
    logits = random_logits((3, 5000), torch.float32, device)
    at = coordinates(3, device)
    temperature = torch.tensor([0.5, 1.0, 4.0] if drawn else [1.0] * 3, dtype=torch.float64)
    draw = Draw(temperature=temperature.to(device), **at, stream=2) if drawn else None
    scaled = logits.cpu() / temperature.float()[:, None]
    # Most blocks of the vocabulary have nothing left; the last row keeps one value.
    cutoff = torch.stack([scaled[0].sort().values[-40], scaled[1].median(), scaled[2].max()])
    left = scaled >= cutoff[:, None]
    candidates, values = token_confidence(
        logits, statistic, draw, cutoff=cutoff.to(device), shaped=shaped
    )
    exact = logits.cpu().double()
    cut = exact.masked_fill(~left, -math.inf)
    noise = gumbel_noise(at, 5000, stream=2) * temperature[:, None] if drawn else None
    expected, _ = token_confidence_reference(cut, statistic, noise)
    assert torch.equal(candidates.cpu(), expected)
    behind = (cut if shaped else exact) + 0.0
    _, value = token_confidence_reference(
        behind,
        statistic,
        None if noise is None else noise.masked_fill(~left, -math.inf),
        temperature if shaped else None,
    )
    assert_statistic(values, value, logits, statistic)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_shows_although_it_is_cut(device: str, bad: float) -> None:
    logits = random_logits((2, 3000), torch.float32, device)
    logits[1, 2500] = bad
    cutoff = torch.full((2,), 5.0, device=device)
    _, values = token_confidence(logits, Statistic.PROBABILITY, cutoff=cutoff, shaped=True)
    assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("statistic", Statistic)
def test_a_row_is_the_same_in_any_batch(device: str, statistic: Statistic) -> None:
    logits = random_logits((3, 5000), torch.float32, device)
    candidates, values = token_confidence(logits, statistic)
    for row in range(3):
        alone, value = token_confidence(logits[row : row + 1], statistic)
        assert alone.item() == candidates[row].item()
        assert (value is None and values is None) or torch.equal(value[0], values[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("statistic", Statistic)
@pytest.mark.parametrize("fill", [float("nan"), -float("inf")], ids=["nan", "minus_infinity"])
def test_degenerate_rows_stay_in_the_vocabulary(
    device: str, statistic: Statistic, fill: float
) -> None:
    logits = torch.full((2, 4500), fill, device=device)
    logits[1, 4400] = 3.0
    logits[1, :100] = -float("inf")
    candidates, values = token_confidence(logits, statistic)
    assert 0 <= candidates[0].item() < 4500
    if fill == fill:
        assert candidates[1].item() == 4400
        expected = {Statistic.PROBABILITY: 1.0, Statistic.MARGIN: 1.0}.get(statistic, 0.0)
        assert values is None or values[1].item() == expected
    assert values is None or values[0].isnan()


@pytest.mark.parametrize("device", DEVICES)
def test_uniform_rows(device: str) -> None:
    at = coordinates(3, device)
    found = uniform_rows(**at, stream=1).tolist()
    rows = zip(*(x.tolist() for x in at.values()), strict=True)
    assert found == [uniform_reference(*row, 1) for row in rows]
    assert uniform_rows(*(torch.zeros(0, dtype=torch.int64),) * 3, stream=0).shape == (0,)
    many = torch.arange(1000, device=device)
    values = uniform_rows(many * 0 + 5, many * 0, many, stream=3)
    assert values[999].item() == uniform_reference(5, 0, 999, 3)
    assert 0.45 < values.mean().item() < 0.55


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param((torch.zeros(4), Statistic.MARGIN), "logits must be", id="dimensions"),
        pytest.param((torch.zeros(4, 4).T, Statistic.MARGIN), "logits must be", id="stride"),
        pytest.param((torch.zeros(4, 4).double(), Statistic.MARGIN), "float16 or", id="dtype"),
        pytest.param(
            (
                torch.zeros(4, 4),
                Statistic.MARGIN,
                Draw(torch.ones(4), *(torch.zeros(4, dtype=torch.int64),) * 3, 0),
            ),
            "temperature must be",
            id="temperature",
        ),
    ],
)
def test_arguments_are_checked(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_confidence(*arguments)


def test_coordinates_are_checked() -> None:
    rows = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="step must be"):
        uniform_rows(rows, rows[:3], rows, stream=0)
