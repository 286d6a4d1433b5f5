"""Golden cases of several tokens a pass, without an engine: tokens, history, number of passes."""

import random

import pytest

from tests.decoding.plain_engine import PlainEngine, engine_settings, golden_model, make_state
from tests.golden.parallel_cases import MODELS, ParallelCase, parallel_cases

CASES = [case for model in MODELS for case in parallel_cases(model)]


def test_the_cases_are_there() -> None:
    assert [len(parallel_cases(model)) for model in MODELS] == [19, 15]


def state_of(case: ParallelCase, sent: list[int] | None = None):
    settings = engine_settings(golden_model(case.model).dimensions.mask_token_id)
    return make_state(
        settings, case.prompt, case.canvas, case.extra_args, sent=sent or [], name=case.name
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(case: ParallelCase) -> None:
    engine = PlainEngine.of_golden(case.model)
    state = state_of(case)
    assert engine.run([state]) == [case.expected]
    assert engine.history[state] == case.history
    assert state.num_passes == len(case.history)
    assert state.num_decided == case.canvas


@pytest.mark.parametrize("model", MODELS)
def test_together_joining_and_preempted_at_random(model: str) -> None:
    """Each has its tokens and passes whoever runs beside it; a preempted one starts again."""
    rng = random.Random(5)
    engine = PlainEngine.of_golden(model)
    waiting = parallel_cases(model)
    rng.shuffle(waiting)
    running, outputs = [], {case.name: [] for case in waiting}
    while waiting or running:
        if waiting and (rng.random() < 0.5 or not running):
            case = waiting.pop()
            running.append((case, state_of(case)))
        if running and rng.random() < 0.05:
            place = rng.randrange(len(running))
            case, _ = running[place]
            running[place] = (case, state_of(case, outputs[case.name]))
        rng.shuffle(running)
        parts = engine.step([state for _, state in running])
        for (case, state), part in zip(running, parts, strict=True):
            outputs[case.name] += part
            if state.finished:
                assert outputs[case.name] == case.expected
                # A preempted one skips the passes of blocks that its client has.
                taken = engine.history[state]
                assert taken == case.history[len(case.history) - len(taken) :]
        running = [(case, state) for case, state in running if not state.finished]
