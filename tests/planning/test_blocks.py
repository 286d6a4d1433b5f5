"""Blocks, their steps, and how many masks a step decides."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparsed.decoding import ALGORITHMS
from vllm_sparsed.planning.blocks import Block, pattern_step, plan_blocks

LLADA = ("low_confidence", "random")
DREAM = ("maskgit_plus", "topk_margin", "entropy")


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        pytest.param((8, 4, 4, 0), [(0, 4, 2), (4, 8, 2)], id="even"),
        pytest.param((8, 4, 5, 0), [(0, 4, 3), (4, 8, 2)], id="one-step-more-first"),
        pytest.param((10, 4, 9, 0), [(0, 4, 3), (4, 8, 3), (8, 10, 2)], id="short-last-block"),
        pytest.param((8, 4, 1, 0), [(0, 4, 1), (4, 8, 1)], id="at-least-one-step"),
        pytest.param((8, 4, 1000, 0), [(0, 4, 4), (4, 8, 4)], id="at-most-its-masks"),
        pytest.param((8, 4, 1000, 3), [(0, 4, 7), (4, 8, 4)], id="masks-of-the-prompt"),
        pytest.param((10, 4, None, 5), [(0, 4, 4), (4, 8, 4), (8, 10, 2)], id="as-many-as-tokens"),
        pytest.param((7, None, 3, 0), [(0, 7, 3)], id="whole-canvas"),
        pytest.param((7, 2**31 - 1, 3, 0), [(0, 7, 3)], id="block-beyond-canvas"),
        pytest.param((1, 1, 1, 0), [(0, 1, 1)], id="one-token"),
    ],
)
def test_plan_blocks(arguments, blocks) -> None:
    assert plan_blocks(*arguments) == tuple(Block(*block) for block in blocks)


@given(
    canvas=st.integers(1, 3000),
    block_length=st.none() | st.integers(1, 4000),
    steps=st.none() | st.integers(1, 4000),
    prompt_masks=st.integers(0, 50),
)
def test_blocks_cover_the_canvas_and_their_steps_decide_it(
    canvas: int, block_length: int | None, steps: int | None, prompt_masks: int
) -> None:
    blocks = plan_blocks(canvas, block_length, steps, prompt_masks)
    assert [block.start for block in blocks] == [0, *[block.end for block in blocks[:-1]]]
    assert blocks[-1].end == canvas
    total = sum(block.steps for block in blocks)
    if steps is None:
        assert total == canvas
    else:
        assert total <= max(steps, len(blocks))
        if blocks[-1].end - blocks[-1].start >= -(-steps // len(blocks)) and steps >= len(blocks):
            assert total == steps
    for index, block in enumerate(blocks):
        masks = block.end - block.start + (prompt_masks if index == 0 else 0)
        assert 1 <= block.steps <= masks
        for name, algorithm in ALGORITHMS.items():
            if block.steps <= 64 and name != "origin":
                left = masks
                for step in range(block.steps):
                    count = algorithm.num_to_unmask(masks, left, step, block.steps, 1e-3)
                    assert 0 <= count <= left
                    left -= count
                assert left == 0


@pytest.mark.parametrize("bad", [(0, 4, 4, 0), (4, 0, 4, 0), (4, 4, 0, 0), (4, 4, 4, -1)], ids=str)
def test_plan_blocks_refuses(bad) -> None:
    with pytest.raises(ValueError, match=r"masks in the prompt|steps"):
        plan_blocks(*bad)


@pytest.mark.parametrize(
    ("total", "skip", "step"), [(64, 0.2, 13), (64, 0.0, 1), (10, 0.99, 10), (1, 0.5, 1)]
)
def test_pattern_step(total: int, skip: float, step: int) -> None:
    assert pattern_step(total, skip) == step


@pytest.mark.parametrize("name", LLADA)
def test_llada_counts(name: str) -> None:
    counts = [ALGORITHMS[name].num_to_unmask(11, 0, step, 4, 0.5) for step in range(4)]
    assert counts == [3, 3, 3, 2]


@pytest.mark.parametrize("eps", [1e-3, 0.25, 1e-300, 0.999])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 1000])
def test_dream_counts_equal_0_dim_tensor_arithmetic(steps: int, eps: float) -> None:
    times = torch.linspace(1, eps, steps + 1)
    for masks in (1, 5, 127, 128, 4096):
        left = torch.tensor(float(masks))
        for step in range(steps):
            t, s = times[step], times[step + 1]
            expected = int(left * (1 - s / t)) if step < steps - 1 else int(left)
            for name in DREAM:
                algorithm = ALGORITHMS[name]
                assert algorithm.num_to_unmask(masks, int(left), step, steps, eps) == expected
                assert algorithm.unmask_probability(step, steps, eps) == 1.0
            left -= expected
        assert left == 0


def test_float32_decides_some_counts() -> None:
    # In float64 the count is another one: the reference's rounding is part of its result.
    times = np.linspace(1, 1e-3, 1000 + 1)
    exact = [int(m * (1 - times[1:] / times[:-1])[i]) for m in range(1, 200) for i in range(999)]
    algorithm = ALGORITHMS["entropy"]
    ours = [algorithm.num_to_unmask(m, m, i, 1000, 1e-3) for m in range(1, 200) for i in range(999)]
    assert ours != exact


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_origin_counts_all_and_draws_each(steps: int) -> None:
    origin = ALGORITHMS["origin"]
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        assert origin.num_to_unmask(9, 5, step, steps, 1e-3) == 5
        expected = 1.0 if step == steps - 1 else float(1 - times[step + 1] / times[step])
        assert origin.unmask_probability(step, steps, 1e-3) == expected


def test_registry_names() -> None:
    assert {name: algorithm.name for name, algorithm in ALGORITHMS.items()} == {
        name: name for name in (*LLADA, "origin", *DREAM)
    }
