"""The reuse policy asks for the rows of the golden histories, pass by pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_sparsed.planning.reuse import OpenBlock, ReusePolicy, ReuseProgress

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = {
    f"{folder}-{model}-{index}": (model, case)
    for folder in ("parallel", "window")
    for model in ("llada-mha", "dream-gqa")
    for index, case in enumerate(json.loads((GOLDEN / folder / f"{model}.json").read_text()))
    if case["params"].get("cache") != "none"
}


def policy_of(model: str, params: dict[str, Any]) -> ReusePolicy:
    return ReusePolicy(
        mode=params.get("cache", "window"),
        warmup_passes=params.get("warmup", 1),
        refresh_tokens=params.get("refresh_tokens", 1),
        refresh_passes=params.get("refresh_passes"),
        margin=params.get("margin", 0),
        logit_shift=int(model == "dream-gqa"),
    )


def dream_count(masks: int, index: int, steps: int) -> int:
    times = [1 + (1e-3 - 1) * i / steps for i in range(steps + 1)]
    return masks if index == steps - 1 else int(masks * (1 - times[index + 1] / times[index]))


@pytest.mark.parametrize("name", CASES)
def test_rows_of_golden_passes(name: str) -> None:
    model, case = CASES[name]
    params = case["params"]
    prompt_len, block_length = len(case["prompt_token_ids"]), params["block"]
    seq_len = prompt_len + params["gen"]
    policy, progress = policy_of(model, params), ReuseProgress()
    steps = params.get("steps")
    masked = set(range(params["gen"]))
    step = 0
    for number, entry in enumerate(case["history"]):
        block = min(masked) // block_length
        start, end = block * block_length, (block + 1) * block_length
        if steps is not None and model == "dream-gqa" and policy.mode == "window":
            # Steps that decide nothing are no passes.
            per_block = steps * block_length // params["gen"]
            left = sum(1 for position in masked if position < end)
            while dream_count(left, step - block * per_block, per_block) == 0:
                step += 1
        open_block = OpenBlock(prompt_len + start, prompt_len + end, prompt_len + min(masked))
        rows = progress.window(policy, open_block, seq_len)
        expected = "full" if rows is None else [row - prompt_len for row in rows]
        assert expected == entry["rows"], number
        if progress.first_alone(policy, open_block):
            assert [position for position, _ in entry["decided"]] == [start]
        masked -= {position for position, _ in entry["decided"]}
        progress.advance(open_block, rows is None, len(entry["decided"]))
        step += 1
    assert not masked


def window_policy(**changes: Any) -> ReusePolicy:
    values: dict[str, Any] = {
        "mode": "window",
        "warmup_passes": 1,
        "refresh_tokens": 1000,
        "refresh_passes": None,
        "margin": 4,
        "logit_shift": 0,
    }
    return ReusePolicy(**{**values, **changes})


def test_a_candidate_outside_the_window_needs_a_refresh() -> None:
    progress = ReuseProgress()
    progress.advance(OpenBlock(20, 28, 20), True, 1)
    assert progress.window(window_policy(), OpenBlock(20, 28, 16), 60) == (16, 32)
    assert progress.window(window_policy(), OpenBlock(20, 28, 15), 60) is None
    for mode in ("prefix", "dual"):
        policy = window_policy(mode=mode)
        assert progress.window(policy, OpenBlock(20, 28, 19), 60) is None
        assert progress.window(policy, OpenBlock(20, 28, 20), 60) is not None


def test_a_pass_that_decides_nothing_counts_for_one() -> None:
    progress = ReuseProgress()
    progress.advance(OpenBlock(20, 28, 20), True, 0)
    progress.advance(OpenBlock(20, 28, 20), False, 0)
    block = OpenBlock(20, 28, 20)
    assert progress.window(window_policy(refresh_tokens=3), block, 60) is not None
    progress.advance(OpenBlock(20, 28, 20), False, 0)
    assert progress.window(window_policy(refresh_tokens=3), block, 60) is None


@pytest.mark.parametrize("mode", ["prefix", "dual"])
def test_fast_dllm_decides_the_first_position_of_a_dream_block_alone(mode: Any) -> None:
    policy = window_policy(mode=mode, logit_shift=1)
    progress = ReuseProgress()
    assert progress.first_alone(policy, OpenBlock(20, 28, 20))
    assert not progress.first_alone(policy, OpenBlock(20, 28, 3)), "a mask inside the prompt"
    progress.advance(OpenBlock(20, 28, 20), True, 1)
    assert not progress.first_alone(policy, OpenBlock(20, 28, 21))
    assert progress.first_alone(policy, OpenBlock(28, 36, 28))
    assert not progress.first_alone(window_policy(mode=mode), OpenBlock(28, 36, 28)), "LLaDA"


def test_expected_refreshes() -> None:
    assert window_policy(refresh_tokens=128).expected_refreshes(1000, 32) == 8
    assert window_policy(mode="dual").expected_refreshes(1000, 32) == 32


def test_another_open_block_is_entered_by_fast_dllms_modes_and_widens_the_window() -> None:
    progress = ReuseProgress()
    progress.advance(OpenBlock(20, 28, 20), True, 1)
    both = OpenBlock(20, 36, 22)
    assert progress.window(window_policy(), both, 60) == (16, 40)
    assert progress.window(window_policy(mode="dual"), both, 60) is None
    progress.advance(both, False, 1)
    assert progress.window(window_policy(), OpenBlock(28, 36, 30), 60) == (16, 40)
    assert progress.window(window_policy(mode="dual"), both, 60) == (20, 36)
