"""Golden cases of several tokens a pass in an engine: tokens, history, number of passes."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM

from tests.golden.parallel_cases import MODELS, ParallelCase, parallel_cases
from vllm_sparsed.worker.request_state import RequestState

History = dict[str, list[list[list[int]]]]


@pytest.fixture
def histories(monkeypatch: pytest.MonkeyPatch) -> History:
    """What each forward pass of each request decided, by the name it was added under."""
    recorded: History = {}
    commit = RequestState.commit

    def recording(self: RequestState, tokens: Any) -> None:
        before = self.tokens[self.plan.prompt_len :].copy()
        commit(self, tokens)
        if tokens is not None:
            now = self.tokens[self.plan.prompt_len :]
            changed = (before != now).nonzero()[0]
            # vLLM appends a random part to the name.
            name = self.request_id.rsplit("-", 1)[0]
            recorded.setdefault(name, []).append([[int(p), int(now[p])] for p in changed])

    monkeypatch.setattr(RequestState, "commit", recording)
    return recorded


def run(llm: LLM, cases: list[ParallelCase], preempt_after: int | None = None) -> dict[str, Any]:
    """Tokens by name; all requests are preempted once after so many engine steps."""
    for case in cases:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    tokens: dict[str, list[int]] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        if steps == preempt_after:
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    return tokens


@pytest.mark.parametrize("model", MODELS)
def test_alone(engine: Callable[[str], LLM], model: str, histories: History) -> None:
    for case in parallel_cases(model):
        assert run(engine(model), [case]) == {case.name: case.expected}
        assert histories[case.name] == case.history, case.name


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_in_one_batch_in_any_order(
    engine: Callable[[str], LLM], model: str, order: int, histories: History
) -> None:
    cases = parallel_cases(model)
    random.Random(order).shuffle(cases)
    assert run(engine(model), cases) == {case.name: case.expected for case in cases}
    assert histories == {case.name: case.history for case in cases}


@pytest.mark.parametrize("after_steps", [1, 7, 30])
@pytest.mark.parametrize("model", MODELS)
def test_after_a_forced_preemption(
    engine: Callable[[str], LLM], model: str, after_steps: int, histories: History
) -> None:
    cases = parallel_cases(model)
    expected = {case.name: case.expected for case in cases}
    assert run(engine(model), cases, preempt_after=after_steps) == expected
    for case in cases:
        taken = histories[case.name]
        # It ends with the passes that follow from where it started again.
        assert taken[-1] == case.history[-1]
        assert {tuple(e) for d in taken for e in d} == {tuple(e) for d in case.history for e in d}
        assert len(taken) <= len(case.history) + after_steps
