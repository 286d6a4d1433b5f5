"""Requests that are taken step by step leave the engine empty, however they end."""

from types import SimpleNamespace

import pytest

from benchmarks.engine.denoising_engine import run_request


class Engine:
    """As much of `LLM.llm_engine` as a request needs; a step may fail."""

    def __init__(self, steps: int, failing: int = -1) -> None:
        self.left = {"": steps}
        self.taken = 0
        self.aborted = 0
        self.failing = failing
        self.output_processor = SimpleNamespace(request_states={})
        model_config = SimpleNamespace(get_vocab_size=lambda: 400)
        self.vllm_config = SimpleNamespace(model_config=model_config)

    def add_request(self, request_id: str, prompt: object, params: object) -> None:
        self.output_processor.request_states[request_id] = None
        self.left = {request_id: self.left[""]}

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[SimpleNamespace]:
        if self.taken == self.failing:
            self.failing = -1
            raise RuntimeError("out of memory")
        self.taken += 1
        self.left = {name: n - 1 for name, n in self.left.items() if n > 1}
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7] * self.taken)])]

    def abort_request(self, request_ids: list[str], internal: bool) -> None:
        self.aborted += 1
        assert request_ids == list(self.left) and internal
        self.left = {}


def test_to_the_end() -> None:
    engine = Engine(steps=4)
    run = run_request(engine, length=8, canvas=4, steps=4)
    assert (len(run.seconds), run.tokens, engine.aborted) == (4, [7] * 4, 0)


def test_some_steps() -> None:
    engine = Engine(steps=4)
    run = run_request(engine, length=8, canvas=4, steps=4, max_steps=2)
    assert (len(run.seconds), engine.aborted, engine.has_unfinished_requests()) == (2, 1, False)


def test_a_step_that_fails() -> None:
    engine = Engine(steps=4, failing=2)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_request(engine, length=8, canvas=4, steps=4)
    assert (engine.aborted, engine.has_unfinished_requests()) == (1, False)
