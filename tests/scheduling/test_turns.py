"""Turns by tokens: shares, starvation, batches."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sparsed.scheduling.turns import MIN_STEP_TOKENS, FairTurns, Turn


def turn(tokens: int, weight: float = 1.0) -> Turn:
    return Turn(tokens, tokens, weight)


def run(budget: int, turns: list[Turn], steps: int) -> Counter[int]:
    """How often each was chosen."""
    fair = FairTurns(budget)
    count: Counter[int] = Counter()
    for _ in range(steps):
        count.update(fair.choose(turns))
    return count


@pytest.mark.parametrize("budget", [32_768, 65_536])
def test_a_short_request_takes_several_steps_for_one_of_a_long_one(budget: int) -> None:
    """Whether or not both fit the budget together."""
    count = run(budget, [turn(1024), turn(32_768)], 3300)
    assert count[0] >= 31 * count[1] > 31 * 90


def test_a_small_batch_is_charged_what_it_takes() -> None:
    """A step of 16 tokens reads all weights, too: it takes as long as one of 256."""
    count = run(4096, [turn(16), turn(4096)], 1000)
    assert count[0] / count[1] == pytest.approx(4096 / MIN_STEP_TOKENS, rel=0.1)


def test_requests_of_similar_lengths_share_batches() -> None:
    count = run(8192, [turn(100), turn(110), turn(120)], 1000)
    assert min(count.values()) > 0.8 * 1000


def test_equal_requests_that_do_not_fit_together_go_round() -> None:
    turns = [turn(600) for _ in range(7)]
    fair = FairTurns(640)
    order = [fair.choose(turns) for _ in range(21)]
    assert all(len(chosen) == 1 for chosen in order)
    for start in range(0, 21, 7):
        assert {chosen[0] for chosen in order[start : start + 7]} == set(range(7))


def test_weights_are_shares() -> None:
    count = run(640, [turn(600, 1.0), turn(600, 0.5)], 300)
    assert count[0] == pytest.approx(200, abs=3)


def test_nobody_is_chosen_of_nobody() -> None:
    assert FairTurns(10).choose([]) == []


def test_a_long_request_is_not_starved_by_ever_new_short_ones() -> None:
    """Two new ones in every step, each of ten steps: more than the budget holds."""
    rng = random.Random(1)
    fair = FairTurns(1000)
    long = turn(1000)
    turns, left = [long], {id(long): 10**9}
    waited = longest = 0
    for _ in range(2000):
        if len(turns) < 40:
            for _ in range(2):
                turns.append(turn(rng.randint(50, 200)))
                left[id(turns[-1])] = 10
        chosen = [turns[i] for i in fair.choose(turns)]
        waited = 0 if long in chosen else waited + 1
        longest = max(longest, waited)
        for one in chosen:
            left[id(one)] -= 1
        turns = [one for one in turns if left[id(one)]]
    # 40 share the tokens; a step of the long one is a whole engine step.
    assert longest <= 2 * 40


sizes = st.lists(
    st.tuples(st.integers(1, 1000), st.sampled_from([1.0, 0.5, 1 / 16])), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(0, 2**32))
def test_whatever_the_mix(requests: list[tuple[int, float]], seed: int) -> None:
    """Requests come and go: the budget holds, no step is empty, nobody starves."""
    budget = 1000
    rng = random.Random(seed)
    fair = FairTurns(budget)
    turns = [turn(tokens, weight) for tokens, weight in requests]
    waited = dict.fromkeys(map(id, turns), 0)
    for _ in range(300):
        if rng.random() < 0.05:
            turns.append(turn(rng.randint(1, budget)))
            waited[id(turns[-1])] = 0
        if rng.random() < 0.05 and len(turns) > 1:
            turns.pop(rng.randrange(len(turns)))
        if rng.random() < 0.2:  # a pass over a window, or over all again
            changed = rng.choice(turns)
            changed.tokens = changed.cost = rng.randint(1, budget)
        chosen = fair.choose(turns)
        assert chosen == sorted(set(chosen)) and chosen
        assert sum(turns[i].tokens for i in chosen) <= budget
        for i, one in enumerate(turns):
            waited[id(one)] = 0 if i in chosen else waited[id(one)] + 1
            share = one.weight / sum(x.weight for x in turns)
            # At worst it has just had a step of a full budget and waits for another.
            assert waited[id(one)] <= 12 * budget / (share * MIN_STEP_TOKENS)
