"""The scheduler without an engine: who steps when, who is admitted, what is left behind."""

import pickle
import random

import pytest
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from tests.scheduling.scheduler_loop import (
    CONTEXT,
    SchedulerLoop,
    make_config,
    make_request,
    random_arguments,
)
from vllm_sparsed.worker.step_output import DenoisingOutput, StepReport

LONG = {"prompt_len": CONTEXT - 240, "canvas": 240, "steps": 240}


@pytest.fixture(scope="module")
def config() -> object:
    return make_config()


def test_a_short_request_beside_a_long_one(config: object) -> None:
    """16 steps of its own take at most 48 engine steps, wherever the long one is."""
    for before in (0, 1, 7, 100):
        loop = SchedulerLoop(config)
        loop.add("long", **LONG)
        loop.run(before)
        loop.add("short", 24, 16, 16)
        loop.run()
        assert len(loop.steps_of["short"]) == 16 and len(loop.steps_of["long"]) == 240
        assert loop.steps_of["short"][-1] - before < 48
        assert loop.reasons == {"short": "length", "long": "length"}


@pytest.mark.parametrize("prompt_len", [24, 60, 110])
def test_sixteen_short_requests_beside_a_long_one(config: object, prompt_len: int) -> None:
    loop = SchedulerLoop(config)
    loop.add("long", **LONG)
    loop.run(5)
    for i in range(16):
        loop.add(f"short-{i}", prompt_len, 16, 16)
    loop.run()
    for i in range(16):
        steps = loop.steps_of[f"short-{i}"]
        assert len(steps) == 16
        assert steps[-1] - 5 < 5 * 16
    last = max(loop.steps_of[f"short-{i}"][-1] for i in range(16))
    assert sum(step < last for step in loop.steps_of["long"]) > 5, "the long one goes on"


def test_a_larger_budget_does_not_tie_short_steps_to_long_ones() -> None:
    loop = SchedulerLoop(make_config(4 * CONTEXT))
    loop.add("long", **LONG)
    loop.run(3)
    loop.add("short", 300, 16, 16)
    loop.run()
    short = loop.steps_of["short"]
    shared = set(short) & set(loop.steps_of["long"])
    assert len(shared) <= 8 + 1, "fair by tokens: one step of 640 for two of 316"


def test_a_guided_request_whose_halves_take_turns_pays_for_both(config: object) -> None:
    loop = SchedulerLoop(config)
    loop.add("guided", 400, 100, 100, diffusion_cfg_scale=1.0)
    loop.add("plain", 400, 100, 100)
    loop.run()
    guided, plain = loop.steps_of["guided"], loop.steps_of["plain"]
    assert len(guided) == len(plain) == 100
    beside = sum(step <= plain[-1] for step in guided)
    assert beside == pytest.approx(50, abs=3)


def test_rows_of_the_store_are_what_is_admitted_by(config: object) -> None:
    """Two long sparse requests at a time at most; short ones have rows of their own."""
    loop = SchedulerLoop(config)
    for i in range(3):
        loop.add(f"long-{i}", 560, 64, 32)
    for i in range(8):
        loop.add(f"short-{i}", 24, 16, 16)
    loop.add("dense", 560, 64, 8, sparsed_enabled=0)
    loop.run(1)
    names = {request.request_id for request in loop.scheduler.running}
    assert names == {"long-0", "dense", *(f"short-{i}" for i in range(8))}
    loop.run()
    ends = [loop.steps_of[f"long-{i}"][-1] for i in range(3)]
    assert ends == sorted(ends)
    starts = [loop.steps_of[f"long-{i}"][0] for i in range(3)]
    assert starts[1] > ends[0] and starts[2] > ends[1]
    loop.assert_empty()


def test_one_that_waits_for_rows_is_not_overtaken(config: object) -> None:
    """Requests of half the rows each: one of all rows among them gets its turn."""
    loop = SchedulerLoop(config)
    for i in range(2):
        loop.add(f"first-{i}", 300, 16, 16)
    loop.add("whole", 620, 16, 4)
    for i in range(6):
        loop.add(f"later-{i}", 300, 16, 16)
    loop.run()
    assert all(loop.steps_of["whole"][-1] < loop.steps_of[f"later-{i}"][0] for i in range(6))


def test_a_request_that_is_not_scheduled_is_sent_later(config: object) -> None:
    """The worker learns of a request with its first step, also where that is not its first turn."""
    loop = SchedulerLoop(config)
    for i in range(5):
        loop.add(f"long-{i}", 600, 32, 4, sparsed_enabled=0)
    output = loop.step()
    assert [data.req_id for data in output.scheduled_new_reqs] == ["long-0"]
    assert len(loop.scheduler.running) == 5
    output = loop.step()
    assert [data.req_id for data in output.scheduled_new_reqs] == ["long-1"]
    loop.scheduler.finish_requests(["long-4"], RequestStatus.FINISHED_ABORTED)
    loop.run()
    assert "long-4" not in loop.steps_of
    loop.assert_empty()


def test_priorities_are_shares() -> None:
    loop = SchedulerLoop(make_config(scheduling_policy="priority", max_num_seqs=4))
    for name, priority in (("high", -3), ("low", 7), ("lowest", 2**62)):
        loop.add(name, 500, 100, 100, priority=priority, sparsed_enabled=0)
    loop.run()
    end = loop.steps_of["high"][-1]
    taken = [sum(step <= end for step in loop.steps_of[name]) for name in ("low", "lowest")]
    assert taken == [pytest.approx(50, abs=3), pytest.approx(25, abs=3)]


def test_a_pause_stops_all_turns(config: object) -> None:
    loop = SchedulerLoop(config)
    loop.add("one", 24, 16, 16)
    loop.run(2)
    loop.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert not loop.step().num_scheduled_tokens
    loop.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    loop.add("two", 24, 16, 16)
    assert list(loop.step().num_scheduled_tokens) == ["one"]
    loop.scheduler.set_pause_state(PauseState.UNPAUSED)
    loop.run()
    assert loop.reasons == {"one": "length", "two": "length"}
    loop.assert_empty()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("budget", [CONTEXT, 2048])
def test_random_schedules(policy: str, budget: int) -> None:
    """Nothing hangs, leaks, starves or changes, with aborts and preemptions."""
    config = make_config(budget, scheduling_policy=policy, max_num_seqs=8)
    for seed in range(40):
        rng = random.Random(seed)
        loop = SchedulerLoop(config)
        queue = [(f"{i}", random_arguments(rng)) for i in range(rng.randrange(1, 30))]
        expected = {}
        for name, arguments in queue:
            loop.add(name, **arguments)
            loop.run()
            expected[name] = loop.tokens.pop(name)
            loop.reasons.clear()
        loop.assert_empty()
        loop = SchedulerLoop(config)
        waiting, aborted = list(queue), set()
        while waiting or loop.scheduler.has_requests():
            if waiting and rng.random() < 0.4:
                name, arguments = waiting.pop()
                loop.add(name, **arguments)
            if loop.scheduler.requests and rng.random() < 0.05:
                name = rng.choice(sorted(loop.scheduler.requests))
                loop.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)
                aborted.add(name)
            if rng.random() < 0.03:
                loop.scheduler.reset_prefix_cache(reset_running_requests=True)
            loop.step()
            assert loop.steps < 3000, "a request hangs"
        for name, tokens in expected.items():
            if name in aborted:
                assert tokens[: len(loop.tokens[name])] == loop.tokens[name]
            else:
                assert loop.tokens[name] == tokens
        loop.assert_empty()


def refused(loop: SchedulerLoop, request: Request) -> str:
    """The message with which a request ends, while another one runs as ever."""
    loop.add("beside", 24, 16, 16)
    loop.run(3)
    loop.scheduler.add_request(request)
    loop.run()
    assert loop.reasons == {"beside": "length", request.request_id: "error"}
    assert len(loop.tokens["beside"]) == 16 and len(loop.steps_of["beside"]) == 16
    assert not loop.steps_of[request.request_id]
    loop.assert_empty()
    return str(loop.outputs[request.request_id].stop_reason)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"diffusion_steps": 0}, "diffusion_steps"),
        ({"diffusion_steps": "many"}, "diffusion_steps"),
        ({"diffusion_alg": "greedy"}, "diffusion_alg"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"sparsed_block_size": 8}, "sparsed_block_size"),
        ({"diffusion_cfg_scale": float("nan")}, "diffusion_cfg_scale"),
    ],
)
def test_what_cannot_be_planned_ends_alone(
    config: object, arguments: dict[str, object], named: str
) -> None:
    """A client that goes round the front end: the error is its own, and says what is wrong."""
    request = make_request("bad", 24, 16, 16, **arguments)
    assert named in refused(SchedulerLoop(config), request)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompt_token_ids": [5] * CONTEXT}, "no room"),
        ({"prompt_token_ids": [5] * 10 * CONTEXT}, "no room"),
        ({"prompt_token_ids": []}, "token ids"),
        ({"prompt_token_ids": None}, "token ids"),
        ({"prompt_token_ids": [5, 384]}, "outside"),
        ({"prompt_token_ids": [-1]}, "outside"),
        ({"sampling_params": None}, "sampling parameters"),
    ],
)
def test_a_request_by_hand_ends_alone(
    config: object, changes: dict[str, object], named: str
) -> None:
    request = make_request("bad", 24, 16, 16)
    for name, value in changes.items():
        setattr(request, name, value)
    assert named in refused(SchedulerLoop(config), request)


def test_options_that_do_not_exist_here_end_alone(config: object) -> None:
    """vLLM's Rust front end does not run the Python check."""
    request = make_request("bad", 24, 16, 16)
    assert request.sampling_params is not None
    request.sampling_params.min_tokens = 3
    assert "min_tokens" in refused(SchedulerLoop(config), request)


def test_a_second_request_of_one_id_is_dropped(config: object) -> None:
    loop = SchedulerLoop(config)
    loop.add("twice", 24, 16, 16)
    loop.run(2)
    loop.add("twice", 300, 16, 2)
    loop.run()
    assert len(loop.tokens["twice"]) == 16
    loop.assert_empty()


def test_an_id_may_come_again(config: object) -> None:
    loop = SchedulerLoop(config)
    for _ in range(2):
        loop.add("again", 24, 16, 16)
        loop.run(3)
        loop.scheduler.finish_requests(["again"], RequestStatus.FINISHED_ABORTED)
    loop.add("again", 24, 16, 16)
    loop.run()
    assert len(loop.tokens["again"]) >= 16 and loop.reasons == {"again": "length"}
    loop.assert_empty()


def test_a_fault_in_the_worker_ends_the_request_with_its_message(config: object) -> None:
    loop = SchedulerLoop(config)
    loop.add("faulty", 24, 16, 16)
    loop.add("beside", 24, 16, 16)
    loop.run(5)
    loop.faults["faulty"] = StepReport(error="OutOfMemoryError: no room for it")
    loop.run()
    assert loop.reasons == {"faulty": "error", "beside": "length"}
    assert loop.outputs["faulty"].stop_reason == "OutOfMemoryError: no room for it"
    assert len(loop.steps_of["faulty"]) == 6 and len(loop.steps_of["beside"]) == 16
    loop.assert_empty()


def test_the_worker_says_what_the_next_steps_take(config: object) -> None:
    """With keys and values kept, a pass over a window is a few tokens and a refresh all of them."""
    loop = SchedulerLoop(config)
    loop.add("long", 600, 40, 40, sparsed_enabled=0)
    loop.add("whole", 500, 40, 40, sparsed_enabled=0)
    loop.run(3)
    loop.faults["long"] = StepReport(next_tokens=40)
    output = [loop.step() for _ in range(20)][-1]
    assert output.num_scheduled_tokens["long"] == 40
    both = set(loop.steps_of["long"]) & set(loop.steps_of["whole"])
    assert len(both) >= 5, "they now fit one step"
    loop.scheduler.finish_requests(["long"], RequestStatus.FINISHED_ABORTED)
    loop.run()
    loop.assert_empty()


def test_executors_carry_the_reports() -> None:
    """Workers of other processes pickle their output."""
    output = DenoisingOutput(["a"], {"a": 0}, [[5]], reports={"a": StepReport("sparse", 4, 2)})
    assert pickle.loads(pickle.dumps(output)) == output


def test_an_id_may_come_again_before_its_error_was_told(config: object) -> None:
    loop = SchedulerLoop(config)
    loop.scheduler.add_request(make_request("again", 24, 16, 16, diffusion_steps=0))
    loop.scheduler.finish_requests(["again"], RequestStatus.FINISHED_ABORTED)
    loop.add("again", 24, 16, 16)
    loop.run()
    assert loop.reasons == {"again": "length"} and len(loop.tokens["again"]) == 16
    loop.assert_empty()


def with_windows(config: object, number: int, tokens: int) -> SchedulerLoop:
    """So many requests whose passes are windows of so many tokens from their second step on."""
    loop = SchedulerLoop(config)
    for i in range(number):
        loop.faults[f"window-{i}"] = StepReport(next_tokens=tokens, next_is_window=True)
        loop.add(f"window-{i}", 24, 16, 16, sparsed_enabled=0)
    loop.run(2)
    return loop


def test_windows_go_first(config: object) -> None:
    loop = with_windows(config, 3, 40)
    loop.add("whole", 500, 20, 20, sparsed_enabled=0)
    begin = loop.steps
    loop.run(20)
    for name in ("window-0", "window-1", "window-2", "whole"):
        assert [step for step in loop.steps_of[name] if step >= begin] == [
            *range(begin, begin + 20)
        ]


@pytest.mark.parametrize(("number", "tokens"), [(1, 20), (10, 40), (20, 60)])
def test_windows_do_not_starve_a_pass_of_the_whole_budget(
    config: object, number: int, tokens: int
) -> None:
    """Even windows that fill the budget by themselves."""
    loop = with_windows(config, number, tokens)
    loop.add("whole", CONTEXT - 20, 20, 20, sparsed_enabled=0)
    begin = loop.steps
    loop.run(500)
    assert loop.reasons["whole"] == "length"
    # A share as large as any other's, at the least.
    assert loop.steps_of["whole"][-1] - begin <= 20 * (number + 4)
    for i in range(number):
        taken = [step for step in loop.steps_of[f"window-{i}"] if step >= begin]
        assert len(taken) > 0.4 * 500
