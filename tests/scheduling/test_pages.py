"""Pages of requests that keep keys and values: taken whole, given back, and who goes first."""

import random
from typing import Any

import pytest
from vllm.v1.request import RequestStatus

from tests.scheduling.scheduler_loop import (
    CONTEXT,
    SchedulerLoop,
    make_config,
    make_request,
    random_arguments,
)

WINDOW = {"diffusion_kv_reuse": "window", "diffusion_block_length": 16, "sparsed_enabled": 0}


@pytest.fixture(scope="module")
def config() -> Any:
    return make_config()


def reuse_arguments(rng: random.Random) -> dict[str, Any]:
    arguments = random_arguments(rng)
    mode = rng.choice(["none", "prefix", "dual", "window", "window"])
    arguments["diffusion_kv_reuse"] = mode
    if mode == "window":
        arguments["diffusion_refresh_tokens"] = rng.choice([1, 3, 16, 100])
        arguments["diffusion_window_margin"] = rng.choice([0, 4, 16])
    return arguments


@pytest.mark.parametrize("num_pages", [6, 40])
def test_random_schedules_with_aborts_and_preemptions_leave_no_page(
    config: Any, num_pages: int
) -> None:
    """And each request takes the passes that it takes alone."""
    alone: dict[str, list[tuple[int, int]]] = {}
    for seed in range(100):
        rng = random.Random(1000 * num_pages + seed)
        loop = SchedulerLoop(config, num_pages)
        names = [f"{seed}-{i}" for i in range(rng.randint(1, 8))]
        arguments = {name: reuse_arguments(rng) for name in names}
        waiting, disturbed = list(names), set()
        while waiting or loop.scheduler.has_requests():
            event = rng.random()
            if waiting and event < 0.3:
                name = waiting.pop()
                loop.scheduler.add_request(make_request(name, **arguments[name]))
            elif event < 0.35 and loop.scheduler.requests:
                name = rng.choice(sorted(loop.scheduler.requests))
                loop.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                disturbed.add(name)
            elif event < 0.37:
                disturbed |= {request.request_id for request in loop.scheduler.running}
                loop.scheduler.reset_prefix_cache(reset_running_requests=True)
            loop.step()
        loop.assert_empty()
        for name in set(names) - disturbed:
            single = SchedulerLoop(config, num_pages)
            single.scheduler.add_request(make_request(name, **arguments[name]))
            single.run()
            alone[name] = single.rows_of[name]
            assert loop.rows_of[name] == alone[name], arguments[name]
            assert loop.tokens[name] == single.tokens[name]


def test_a_request_whose_pages_never_fit_keeps_nothing(config: Any) -> None:
    loop = SchedulerLoop(config, 4)
    loop.add("long", 500, 64, 4, **WINDOW)
    loop.run()
    assert set(loop.rows_of["long"]) == {(0, 564)}
    assert loop.reasons == {"long": "length"}
    loop.assert_empty()


def test_one_that_waits_for_pages_holds_up_those_alone_that_want_pages(config: Any) -> None:
    loop = SchedulerLoop(config, 6)
    loop.add("first", 500, 64, 32, **WINDOW)
    loop.add("second", 200, 64, 4, **WINDOW)
    loop.add("none", 100, 64, 4)
    loop.add("third", 20, 16, 4, **WINDOW)
    loop.run(1)
    running = [request.request_id for request in loop.scheduler.running]
    assert running == ["first", "none"], "the third does not overtake the second"
    loop.run()
    assert loop.steps_of["second"][0] > loop.steps_of["first"][-1]
    assert len(loop.reasons) == 4
    loop.assert_empty()


def test_windows_go_first_and_a_refresh_that_does_not_fit_still_gets_its_turn(config: Any) -> None:
    """What two window passes leave unused is enough for it."""
    loop = SchedulerLoop(config, 40)
    window = {**WINDOW, "diffusion_refresh_tokens": 1000}
    loop.add("window", 24, 64, 64, **window)
    loop.run(2)
    assert loop.scheduler._progress["window"].next_is_window
    loop.add("whole", CONTEXT - 16, 16, 16, sparsed_enabled=0)
    before = loop.steps
    loop.run(20)
    took = [step for step in loop.steps_of["window"] if step >= before]
    whole = [step for step in loop.steps_of["whole"] if step >= before]
    assert len(took) >= 13 and len(whole) >= 6
    assert not set(took) & set(whole), "together they exceed the budget"
    loop.run()
    loop.assert_empty()


def test_windows_of_all_requests_are_one_pass(config: Any) -> None:
    loop = SchedulerLoop(config, 40)
    for i in range(5):
        loop.add(f"{i}", 60, 64, 64, **{**WINDOW, "diffusion_refresh_tokens": 1000})
    loop.run(10)
    start = loop.steps
    loop.run(6)
    for i in range(5):
        assert [s for s in loop.steps_of[f"{i}"] if s >= start] == list(range(start, start + 6))


def test_windows_are_one_pass_whatever_their_requests_have_had(config: Any) -> None:
    """A refresh of one's own leaves no request behind the others in its windows."""
    loop = SchedulerLoop(config, 40)
    options = {**WINDOW, "diffusion_refresh_tokens": 1000}
    loop.add("first", CONTEXT - 64, 64, 64, **options)
    loop.run(4)
    loop.add("second", CONTEXT - 64, 64, 64, **options)
    loop.run(6)
    start = loop.steps
    loop.run(20)
    for name in ("first", "second"):
        assert [s for s in loop.steps_of[name] if s >= start] == list(range(start, start + 20))


def test_vllms_watermark_keeps_no_request_waiting_for_ever() -> None:
    """It is room for requests that grow; here all pages of one are taken at once."""
    loop = SchedulerLoop(make_config(watermark=0.5), 5)
    loop.add("all", 600, 40, 4, **WINDOW)
    loop.add("again", 600, 40, 4, **WINDOW)
    loop.run(200)
    assert loop.reasons == {"all": "length", "again": "length"}
    assert (0, 640) in loop.rows_of["again"] and len(set(loop.rows_of["again"])) > 1
    loop.assert_empty()
