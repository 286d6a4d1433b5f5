"""Random numbers: the generator itself, and that they depend on their coordinates alone."""

import math

import pytest
import torch
from torch import Tensor

from vllm_sparsed.decoding.rng import Stream, gumbel, uniform

WORD = 2**64


def scalar_mix(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
    return state ^ (state >> 31)


def scalar_uniform(seed: int, step: int, position: int, stream: Stream, column: int) -> float:
    """The same number in Python's unbounded integers."""
    increment = 0x9E3779B97F4A7C15
    key = scalar_mix((seed + (stream + 1) * increment) % WORD)
    key = scalar_mix((key + step * increment) % WORD)
    key = scalar_mix((key + position * increment) % WORD)
    return ((scalar_mix((key + (column + 1) * increment) % WORD) >> 12) + 0.5) * 2.0**-52


def at(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize("stream", list(Stream), ids=lambda stream: stream.name)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_equals_unbounded_integer_arithmetic(seed: int, stream: Stream) -> None:
    steps, positions = (0, 5, 63, 63), (0, 131071, 7, 8)
    drawn = uniform(at(*[seed] * 4), at(*steps), at(*positions), stream, 5)
    expected = [
        [scalar_uniform(seed, step, position, stream, column) for column in range(5)]
        for step, position in zip(steps, positions, strict=True)
    ]
    assert drawn.tolist() == expected
    single = uniform(at(*[seed] * 4), at(*steps), at(*positions), stream)
    assert single.tolist() == [row[0] for row in expected]


def test_first_outputs_of_splitmix64() -> None:
    # The generator's published outputs for the seed 1234567 check the mixing constants.
    assert [scalar_mix((1234567 + i * 0x9E3779B97F4A7C15) % WORD) for i in (1, 2, 3)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_arguments_are_not_changed() -> None:
    seed, step, position = at(3, 4), at(5, 6), at(7, 8)
    uniform(seed, step, position, Stream.CANDIDATE, 3)
    assert [t.tolist() for t in (seed, step, position)] == [[3, 4], [5, 6], [7, 8]]


def test_never_zero_nor_one() -> None:
    lowest, highest = 0.5 * 2.0**-52, (2**52 - 0.5) * 2.0**-52
    assert 0 < lowest < highest < 1
    noise = gumbel(torch.tensor([lowest, highest], dtype=torch.float64))
    assert noise.tolist() == pytest.approx(
        [-math.log(53 * math.log(2)), 53 * math.log(2)], rel=1e-6
    )


@pytest.mark.parametrize("varied", ["seed", "step", "position", "column"])
def test_uniform_along_each_coordinate(varied: str) -> None:
    count, bins = 200_000, 50
    index = torch.arange(count)
    fixed = torch.full_like(index, 42)
    if varied == "column":
        drawn = uniform(at(42), at(42), at(42), Stream.CANDIDATE, count)[0]
    else:
        coordinates = dict.fromkeys(("seed", "step", "position"), fixed) | {varied: index}
        drawn = uniform(**coordinates, stream=Stream.CANDIDATE)
    counts = torch.histc(drawn.float(), bins, 0, 1)
    statistic = float(((counts - count / bins) ** 2 / (count / bins)).sum())
    # Chi-square with 49 degrees of freedom: both bounds are passed with probability 1e-4.
    assert 20 < statistic < 96
    correlation = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(count)


def test_streams_are_uncorrelated() -> None:
    count = 50_000
    index, fixed = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    drawn = torch.stack([uniform(fixed, fixed, index, stream) for stream in Stream])
    correlation = torch.corrcoef(drawn) - torch.eye(len(Stream))
    assert float(correlation.abs().max()) < 5 / math.sqrt(count)


def test_gumbel_noise_has_its_mean_and_variance() -> None:
    noise = gumbel(uniform(at(0), at(0), at(0), Stream.CANDIDATE, 400_000)[0])
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.02)
