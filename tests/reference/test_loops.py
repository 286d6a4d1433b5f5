"""The loops' rules that no golden case reaches, on logits made up by hand."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.reference.generate import (
    Request,
    Sampling,
    Step,
    generate_dream,
    generate_llada,
    llada_blocks,
    output_tokens,
    shape_logits,
)

MASK = 7


class FixedLogits:
    """A sequence whose logits do not depend on its tokens."""

    def __init__(self, logits: list[list[float]]) -> None:
        self.table = torch.tensor(logits)

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        return self.table.clone()


def one_hot(token: int, height: float) -> list[float]:
    """Logits that favour one token of 8: the higher, the more confident."""
    return [height if index == token else 0.0 for index in range(8)]


def request(
    logits: list[list[float]],
    prompt: list[int],
    canvas: int,
    sampling: Sampling | None = None,
    shift: bool = False,
    uniforms: float | None = None,
) -> Request:
    def noise(purpose: str, step: int, positions: Tensor, columns: int | None) -> Tensor:
        assert uniforms is not None
        shape = (len(positions),) if columns is None else (len(positions), columns)
        return torch.full(shape, uniforms, dtype=torch.float64)

    return Request(
        new_sequence=lambda: FixedLogits(logits),
        prompt=torch.tensor(prompt),
        canvas_len=canvas,
        mask_token_id=MASK,
        logit_shift=shift,
        sampling=sampling or Sampling(),
        noise=noise,
    )


def decided(steps: list[Step]) -> list[dict[int, int]]:
    return [dict(zip(step.positions, step.tokens, strict=True)) for step in steps]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((32, 8, 16), [(8, 4), (16, 4), (24, 4), (32, 4)]),
        ((10, 4, 5), [(4, 2), (8, 2), (10, 1)]),
        ((4, 4, 9), [(4, 4)]),
        ((4, 4, 9, 3), [(4, 7)]),
        ((6, 2, 1), [(2, 1), (4, 1), (6, 1)]),
    ],
    ids=["even", "short-last-block", "more-steps-than-masks", "prompt-masks", "fewer-than-blocks"],
)
def test_blocks(arguments: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert llada_blocks(*arguments) == expected


def test_llada_takes_the_most_confident_of_the_block_first() -> None:
    logits = [one_hot(0, 9), one_hot(1, 2), one_hot(2, 4), one_hot(3, 8), one_hot(4, 1)]
    steps = generate_llada(request(logits, [0], 4), steps=4, block_length=2)
    assert decided(steps) == [{2: 2}, {1: 1}, {3: 3}, {4: 4}]
    assert steps[0].token_margin == pytest.approx(4.0)
    assert steps[1].order_margin == math.inf


def test_llada_mask_as_candidate_uses_up_its_turn_and_stays_a_candidate() -> None:
    logits = [one_hot(0, 1), one_hot(MASK, 6), one_hot(2, 1), one_hot(3, 2), one_hot(4, 1)]
    made = request(logits, [0], 4)
    steps = generate_llada(made, steps=4, block_length=2)
    assert decided(steps) == [{1: MASK}, {1: MASK}, {1: MASK}, {1: MASK}]
    assert output_tokens(made, steps) == [MASK] * 4


def test_llada_fills_prompt_masks_with_the_first_block() -> None:
    logits = [one_hot(index, 1 + index) for index in range(5)]
    steps = generate_llada(request(logits, [0, MASK, 2], 2), steps=3, block_length=1)
    assert decided(steps) == [{3: 3}, {1: 1}, {4: 4}]


def test_llada_random_order() -> None:
    logits = [one_hot(index, 1 + index) for index in range(3)]
    steps = generate_llada(
        request(logits, [0], 2, uniforms=0.5), steps=2, block_length=2, alg="random"
    )
    # Equal noise: the first position comes first, although the second is more confident.
    assert decided(steps) == [{1: 1}, {2: 2}]


def test_llada_temperature() -> None:
    # exp(l) / (-log u)^T with the same u everywhere keeps the argmax.
    logits = [one_hot(0, 1), one_hot(3, 0.5)]
    made = request(logits, [0], 1, Sampling(temperature=0.7), uniforms=0.25)
    assert decided(generate_llada(made, steps=1, block_length=1)) == [{1: 3}]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [{1: 1}, {2: 2}]),
        (Sampling(forbidden_token=1), [{2: 2}, {1: 4}]),
        (Sampling(confidence_end_tokens=(1,)), [{2: 2}, {1: 1}]),
    ],
    ids=["off", "logits-eos-inf", "confidence-eos-eot-inf"],
)
def test_llada_end_tokens(sampling: Sampling, expected: list[dict[int, int]]) -> None:
    logits = [one_hot(0, 1), one_hot(1, 5), one_hot(2, 4)]
    logits[1][4] = 1.0
    made = request(logits, [0], 2, sampling)
    assert decided(generate_llada(made, steps=2, block_length=2)) == expected


def test_guidance_moves_away_from_the_unconditional_logits() -> None:
    class Guided:
        def logits(self, tokens: Tensor, step: int) -> Tensor:
            # The unconditional sequence has no prompt token.
            favourite = 1 if tokens[0] == MASK else 2
            return torch.tensor([one_hot(0, 1), one_hot(favourite, 1.0)]) + torch.tensor(
                [0, 1.5, 0.75, 0, 0, 0, 0, 0]
            )

    for scale, token in ((0.0, 2), (2.0, 2)):
        made = Request(Guided, torch.tensor([0]), 1, MASK, False, Sampling(cfg_scale=scale))
        (step,) = generate_llada(made, steps=1, block_length=1)
        assert step.tokens == (token,)
    # l = (1.5, 1.75), u = (2.5, 0.75): u + 3 (l - u) = (-0.5, 3.75).
    assert step.token_margin == pytest.approx(3.75)


def test_dream_rows_are_shifted_and_row_zero_is_used_twice() -> None:
    logits = [one_hot(5, 3), one_hot(1, 2), one_hot(2, 1)]
    made = request(logits, [MASK], 2, shift=True)
    steps = generate_dream(made, steps=1, alg="maskgit_plus")
    assert decided(steps) == [{0: 5, 1: 5, 2: 1}]


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_dream_schedule_and_order(alg: str) -> None:
    logits = [one_hot(index, 1 + index) for index in range(5)]
    steps = generate_dream(request(logits, [0], 4), steps=3, alg=alg)
    # int(4 * 0.333), int(3 * 0.4995), the rest.
    assert decided(steps) == [{4: 4}, {3: 3}, {1: 1, 2: 2}]


@pytest.mark.parametrize(
    ("uniform", "expected"),
    [(0.1, [{1: 1, 2: 2}]), (0.4, [{}, {1: 1, 2: 2}]), (0.999, [{}, {}, {1: 1, 2: 2}])],
    ids=["first", "second", "last"],
)
def test_dream_origin(uniform: float, expected: list[dict[int, int]]) -> None:
    logits = [one_hot(index, 1 + index) for index in range(3)]
    steps = generate_dream(request(logits, [0], 2, uniforms=uniform), steps=3, alg="origin")
    assert decided(steps) == expected


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.5), [0]),
        (Sampling(top_p=0.7), [0, 1]),
        (Sampling(top_p=0.5, temperature=4.0), [0, 1]),
    ],
    ids=["top_k", "top_p", "top_p-keeps-the-crossing-token", "temperature-first"],
)
def test_dream_shaping(sampling: Sampling, left: list[int]) -> None:
    # Probabilities 0.64, 0.16, 0.1, 0.1 at temperature 1; 0.35, 0.25, 0.2, 0.2 or so at 4.
    row = [math.log(p) for p in (0.64, 0.16, 0.1, 0.1)] + [-math.inf] * 4
    shaped = shape_logits(torch.tensor([row]), sampling)
    assert shaped.isfinite().nonzero()[:, 1].tolist() == left
