"""Extrapolation from measured steps to whole requests."""

import pytest

from benchmarks.requests.step_times import StepTimes, steps_by_kind, steps_to_measure
from vllm_sparsed.planning.blocks import pattern_step

TIMES = StepTimes({"dense": [3.0, 1.0, 2.0], "building": [10.0], "sparse": [0.5, 0.7]})


@pytest.mark.parametrize("skip", [0.0, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 8, 15, 128, 1024])
def test_kinds_are_those_that_the_scheduler_runs(total: int, skip: float) -> None:
    building = pattern_step(total, skip)
    kinds = ["dense"] * total
    if building < total - 1:
        kinds = ["dense"] * building + ["building"] + ["sparse"] * (total - building - 1)
    counts = steps_by_kind(total, skip, sparse=True)
    assert counts == {kind: kinds.count(kind) for kind in ("dense", "building", "sparse")}


def test_a_request_takes_the_medians_as_often_as_they_come() -> None:
    # int(128 * 0.2) + 1 = 26 dense steps, then the one that builds.
    assert TIMES.request_seconds(128, 0.2, sparse=True) == pytest.approx(
        26 * 2.0 + 10.0 + 101 * 0.6
    )
    assert TIMES.request_seconds(128, 0.2, sparse=False) == 256.0
    assert TIMES.measured == "3 dense, 1 building, 2 sparse"


def test_what_was_not_measured_is_not_made_up() -> None:
    times = StepTimes({"dense": [1.0]})
    assert times.request_seconds(2, 0.2, sparse=True) == 2.0
    with pytest.raises(KeyError, match="building"):
        times.request_seconds(128, 0.2, sparse=True)
    with pytest.raises(ValueError, match="kind"):
        times.add("other", [1.0])


@pytest.mark.parametrize("skip", [0.1, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(("dense", "sparse"), [(1, 1), (2, 4), (4, 3)])
def test_the_measured_request_is_the_shortest_that_has_what_is_wanted(
    dense: int, sparse: int, skip: float
) -> None:
    total = steps_to_measure(dense, sparse, skip, most=1000)
    counts = steps_by_kind(total, skip, sparse=True)
    assert counts["dense"] >= dense and counts["building"] == 1 and counts["sparse"] >= sparse
    shorter = steps_by_kind(total - 1, skip, sparse=True)
    assert shorter["dense"] < dense or shorter["sparse"] < sparse


def test_what_no_request_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 64 steps.*skip 0\.0"):
        steps_to_measure(2, 2, 0.0, most=64)
