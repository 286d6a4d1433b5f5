"""Which candidates are decided, against sorting in plain Python: exact, also among equals."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from vllm_sparsed.kernels.confidence_ranking import NOT_FINITE, Groups, Rule, decide
from vllm_sparsed.kernels.confidence_ranking.configs import MAX_KERNEL_CANDIDATES
from vllm_sparsed.kernels.confidence_ranking.reference import decide_reference
from vllm_sparsed.kernels.confidence_ranking.torch_path import decide_torch

MASK = 10  # what every seventh candidate would become
PATHS = [
    pytest.param("kernel", id="interpreter"),
    pytest.param("torch", id="torch_path"),
    pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
]


def decided(
    path: str,
    confidence: Tensor,
    lengths: list[int],
    quotas: list[int],
    passes: list[bool] | None = None,
    order: list[int] | None = None,
    rules: list[tuple[Rule, float]] | None = None,
) -> tuple[list[int], list[int]]:
    """What the path decides, and what the reference does."""
    device = "cuda" if path == "cuda" else "cpu"
    tokens = torch.arange(len(confidence)) * 7 + 3
    tokens[1::7] = MASK
    first = torch.tensor([0, *lengths]).cumsum(0)
    kinds = [int(rule) for rule, _ in rules] if rules else [0] * len(lengths)
    bounds = [bound for _, bound in rules] if rules else [0.0] * len(lengths)
    expected = decide_reference(
        tokens.tolist(), confidence.tolist(), first.tolist(), kinds, quotas, bounds, MASK, passes
    )
    group = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if path == "torch":
        result = decide_torch(
            tokens,
            confidence,
            group,
            first,
            torch.tensor(kinds),
            torch.tensor(quotas),
            torch.tensor(bounds, dtype=torch.float64),
            MASK,
            None if passes is None else torch.tensor(passes),
        )
        return result.tolist(), expected
    chance: dict[str, Tensor] = {}
    if passes is not None:
        chance["uniforms"] = torch.where(torch.tensor(passes), 0.25, 0.75).double().to(device)
        chance["probability"] = torch.full((len(lengths),), 0.5).double().to(device)
    groups = Groups(
        group=group.to(device),
        first=first.to(device),
        quota=torch.tensor(quotas).to(device),
        rule=torch.tensor(kinds).to(device) if rules else None,
        bound=torch.tensor(bounds, dtype=torch.float64).to(device) if rules else None,
    )
    result = decide(
        tokens.to(device),
        confidence.to(device),
        groups,
        MASK,
        order=None if order is None else torch.tensor(order).to(device),
        **chance,
    ).tolist()
    return (result if order is None else [result[place] for place in order]), expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["random", "ties", "zeros"])
@pytest.mark.parametrize(
    ("lengths", "quotas"),
    [
        pytest.param([1], [1], id="one_candidate"),
        pytest.param([63], [5], id="one_group"),
        pytest.param([1, 111, 2, 300], [0, 17, 2, 299], id="several"),
        pytest.param([700], [1000], id="all_of_them"),
    ],
)
def test_counts_equal_reference(
    path: str, dtype: torch.dtype, kind: str, lengths: list[int], quotas: list[int]
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths),)
    confidence = {
        "random": torch.rand(shape, generator=generator),
        "ties": torch.randint(-2, 3, shape, generator=generator) / 3.0,
        "zeros": torch.zeros(shape),
    }[kind].to(dtype)
    found, expected = decided(path, confidence, lengths, quotas)
    assert found == expected
    assert sum(token >= 0 for token in found) == sum(
        min(a, b) for a, b in zip(lengths, quotas, strict=True)
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", list(Rule), ids=lambda rule: rule.name)
def test_not_a_number_is_told_and_never_decided(path: str, rule: Rule) -> None:
    inf, nan = float("inf"), float("nan")
    confidence = torch.tensor([-0.5, -inf, nan, -0.1, -inf, nan, -0.5])
    for quota in range(8):
        found, expected = decided(path, confidence, [7], [quota], rules=[(rule, 0.6)])
        assert found == expected
        assert [i for i, token in enumerate(found) if token == NOT_FINITE] == [2, 5]


BOUNDS = {
    Rule.COUNT: st.just(0.0),
    Rule.THRESHOLD: st.sampled_from([-1.0, 0.25, 0.3, 0.5, 1.5]),
    Rule.FACTOR: st.sampled_from([0.1, 1.5, 3.0, 60.0]),
    Rule.ENTROPY_BOUND: st.sampled_from([0.0, 0.5, 2.0, 9.0, 1e300]),
    Rule.ENTROPY_THRESHOLD: st.sampled_from([0.1, 0.25, 0.5, 2.0, 1e300]),
}


@st.composite
def cases(draw: st.DrawFn) -> dict:
    lengths = draw(st.lists(st.integers(1, 60), min_size=1, max_size=5))
    total = sum(lengths)
    kinds = [draw(st.sampled_from(list(Rule))) for _ in lengths]
    confidence: list[float] = []
    for length, rule in zip(lengths, kinds, strict=True):
        sign = -1.0 if rule in (Rule.ENTROPY_BOUND, Rule.ENTROPY_THRESHOLD) else 1.0
        # Multiples of 1/4, which add up exactly, and what is confident of nothing.
        score = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.0, math.inf * sign * -1])
        confidence += [sign * x for x in draw(st.lists(score, min_size=length, max_size=length))]
    return {
        "confidence": torch.tensor([-abs(x) if math.isinf(x) else x for x in confidence]),
        "lengths": lengths,
        "quotas": [draw(st.integers(0, length + 1)) for length in lengths],
        "rules": [(rule, draw(BOUNDS[rule])) for rule in kinds],
        "passes": draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total)),
        "order": list(draw(st.permutations(range(total)))),
    }


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases())
def test_rules_chance_and_order(path: str, case: dict) -> None:
    found, expected = decided(path, **case)
    assert found == expected


@pytest.mark.parametrize("path", PATHS)
def test_a_group_decides_alone_as_in_any_batch(path: str) -> None:
    """Also where floating-point sums of its entropies would depend on where it begins."""
    generator = torch.Generator().manual_seed(3)
    entropies = -torch.rand(700, generator=generator)
    alone, expected = decided(path, entropies, [700], [1], rules=[(Rule.ENTROPY_BOUND, 9.0)])
    assert alone == expected
    for before in (7, 35, 301):  # of which every seventh is the mask token too
        both, _ = decided(
            path,
            torch.cat((torch.rand(before, generator=generator), entropies)),
            [before, 700],
            [1, 1],
            rules=[(Rule.COUNT, 0.0), (Rule.ENTROPY_BOUND, 9.0)],
        )
        assert [token >= 0 for token in both[before:]] == [token >= 0 for token in alone]


@pytest.mark.gpu
@pytest.mark.parametrize("num_candidates", [MAX_KERNEL_CANDIDATES, 65536])
@pytest.mark.parametrize("rule", [(Rule.COUNT, 0.0), (Rule.ENTROPY_BOUND, 99.0)], ids=str)
def test_a_long_canvas_on_gpu(num_candidates: int, rule: tuple[Rule, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    confidence = -torch.randint(0, 900, (num_candidates,), generator=generator) / 1024
    order = torch.randperm(num_candidates, generator=generator).tolist()
    passes = (torch.rand(num_candidates, generator=generator) < 0.5).tolist()
    quota = num_candidates // 3 if rule[0] == Rule.COUNT else 1
    found, expected = decided(
        "cuda", confidence, [num_candidates], [quota], passes, order, rules=[rule]
    )
    assert found == expected


def test_no_candidates() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    groups = Groups(group=empty, first=torch.zeros(1, dtype=torch.int64), quota=empty)
    assert decide(empty, torch.empty(0), groups, MASK).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"confidence": torch.zeros(4).half()}, "confidence must", id="dtype"),
        pytest.param({"tokens": torch.zeros(4)}, "tokens must", id="tokens"),
        pytest.param({"uniforms": torch.zeros(4).double()}, "go together", id="half"),
        pytest.param({"order": torch.zeros(3, dtype=torch.int64)}, "order must", id="order"),
        pytest.param(
            {"uniforms": torch.zeros(4), "probability": torch.zeros(1).double()},
            "uniforms must",
            id="uniforms",
        ),
        pytest.param(
            {
                "groups": Groups(
                    group=torch.zeros(4, dtype=torch.int64),
                    first=torch.zeros(4, dtype=torch.int64),
                    quota=torch.zeros(1, dtype=torch.int64),
                )
            },
            "groups.first must",
            id="bounds",
        ),
        pytest.param(
            {
                "groups": Groups(
                    group=torch.zeros(4, dtype=torch.int64),
                    first=torch.tensor([0, 4]),
                    quota=torch.zeros(1, dtype=torch.int64),
                    rule=torch.zeros(1, dtype=torch.int64),
                )
            },
            "go together",
            id="rule-without-bound",
        ),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    arguments = {
        "tokens": torch.zeros(4, dtype=torch.int64),
        "confidence": torch.zeros(4),
        "mask_token_id": MASK,
        "groups": Groups(
            group=torch.zeros(4, dtype=torch.int64),
            first=torch.tensor([0, 4]),
            quota=torch.zeros(1, dtype=torch.int64),
        ),
    }
    with pytest.raises(ValueError, match=message):
        decide(**(arguments | change))
