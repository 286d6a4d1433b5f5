"""Faults injected into a step: they end the request that causes them, and no other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.engine.golden_cases import GoldenCase, load_cases
from tests.engine.inspection import runner_of
from tests.engine.test_schedules import assert_empty
from vllm_sparsed.worker import step_faults
from vllm_sparsed.worker.model_runner import NOT_FINITE, DenoisingModelRunner
from vllm_sparsed.worker.packing import PackedBatch
from vllm_sparsed.worker.request_state import RequestState
from vllm_sparsed.worker.step_faults import DeviceLostError, run_apart_where_it_fails

CASES = load_cases("llada-mha")
CPU = torch.device("cpu")


@pytest.fixture
def llm(engine: Callable[[str], LLM]) -> LLM:
    return engine("llada-mha")


@pytest.fixture
def runner(llm: LLM) -> Iterator[DenoisingModelRunner]:
    runner = runner_of(llm)
    yield runner
    runner._warned_of_non_finite = False


def run_beside(llm: LLM, faulty: GoldenCase) -> Any:
    """Run it among all cases: the others give their golden tokens. Returns its completion."""
    for case in CASES:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    llm.llm_engine.add_request(
        "faulty", {"prompt_token_ids": faulty.prompt}, faulty.sampling_params()
    )
    ended = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            ended[output.request_id] = output.outputs[0]
    completion = ended.pop("faulty")
    assert {name: list(c.token_ids) for name, c in ended.items()} == {
        case.name: case.expected for case in CASES
    }
    assert_empty(llm)
    assert completion.finish_reason == "error"
    return completion


def is_faulty(state: RequestState) -> bool:
    return state.request_id.startswith("faulty")


@pytest.mark.parametrize(
    "error",
    [ValueError("of its own"), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")],
    ids=["exception", "memory"],
)
@pytest.mark.parametrize("index", [0, 6], ids=["dense", "building"])
def test_a_pass_that_fails_for_one_request(
    llm: LLM,
    runner: DenoisingModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    index: int,
) -> None:
    """Also in the step that builds its patterns: their rows are given back."""
    run_pass = runner.run_pass

    def fail(batch: PackedBatch) -> torch.Tensor:
        for state, _ in batch.sequences:
            if is_faulty(state) and (index == 0 or state.builds_patterns()):
                raise error
        return run_pass(batch)

    monkeypatch.setattr(runner, "run_pass", fail)
    assert str(error) in run_beside(llm, CASES[index]).stop_reason


def test_a_batch_that_does_not_fit_is_run_in_parts(
    llm: LLM, runner: DenoisingModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is to blame, and nobody ends."""
    run_pass = runner.run_pass

    def fail(batch: PackedBatch) -> torch.Tensor:
        if len(batch.sequences) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_pass(batch)

    monkeypatch.setattr(runner, "run_pass", fail)
    for case in CASES:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    tokens = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert tokens == {case.name: case.expected for case in CASES}
    assert_empty(llm)


def test_logits_that_are_not_finite(
    llm: LLM, runner: DenoisingModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_and_decode = runner._forward_and_decode
    errors: list[str] = []
    monkeypatch.setattr(
        "vllm_sparsed.worker.model_runner.logger.error", lambda text, *args: errors.append(text)
    )

    def give(states: Sequence[RequestState], reports: Any) -> Any:
        tokens = forward_and_decode(states, reports)
        for state, of_state in zip(states, tokens, strict=True):
            if is_faulty(state) and state.step > 2:
                of_state[:] = NOT_FINITE
        return tokens

    monkeypatch.setattr(runner, "_forward_and_decode", give)
    for _ in range(2):
        assert "non-finite logits" in run_beside(llm, CASES[0]).stop_reason
    assert len(errors) == 1, "one line per engine"


def test_a_request_that_cannot_be_started(
    llm: LLM, runner: DenoisingModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_request = RequestState.from_request

    def start(data: Any, *others: Any) -> RequestState:
        if data.req_id.startswith("faulty"):
            raise OverflowError("Python int too large to convert to C long")
        return from_request(data, *others)

    monkeypatch.setattr(RequestState, "from_request", start)
    assert "OverflowError" in run_beside(llm, CASES[0]).stop_reason


def test_a_decision_that_cannot_be_written_down(
    llm: LLM, runner: DenoisingModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = RequestState.commit

    def fail(state: RequestState, tokens: Any) -> None:
        if is_faulty(state) and state.step > 2:
            raise IndexError("of its own")
        commit(state, tokens)

    monkeypatch.setattr(RequestState, "commit", fail)
    assert "IndexError: of its own" in run_beside(llm, CASES[0]).stop_reason


def test_a_lost_device_ends_the_engine_and_says_so(
    llm: LLM, runner: DenoisingModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(batch: PackedBatch) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    case = CASES[0]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_pass", fail)
        patch.setattr(step_faults, "_works", lambda device: False)
        llm.llm_engine.add_request(
            "lost", {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
        with pytest.raises(DeviceLostError, match=r"illegal memory access .*Start the server"):
            llm.llm_engine.step()
    llm.llm_engine.abort_request(["lost"])
    assert_empty(llm)


def test_other_ranks_are_not_kept_waiting() -> None:
    """What fails here for want of memory would not fail there: no run of its own then."""

    def fail(items: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_apart_where_it_fails([1, 2], fail, lambda items: None, CPU, one_rank=False)


@pytest.mark.parametrize("one_rank", [True, False])
def test_results_and_errors_by_index(one_rank: bool) -> None:
    undone: list[list[int]] = []

    def run(items: Sequence[int]) -> list[int]:
        if 2 in items:
            raise ValueError("two\nand more")
        return [10 * item for item in items]

    outcome = run_apart_where_it_fails(
        [1, 2, 3], run, lambda items: undone.append(list(items)), CPU, one_rank
    )
    assert outcome.results == {0: 10, 2: 30}
    assert outcome.errors == {1: "ValueError: two"}
    assert undone == [[1, 2, 3], [2]]
