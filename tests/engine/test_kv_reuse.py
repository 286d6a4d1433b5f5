"""Keys and values kept between passes: the golden tokens, rows and attention of each pass."""

from collections.abc import Callable

import pytest
from vllm import LLM

from tests.engine.golden_cases import MODELS
from tests.engine.reuse_cases import ReuseCase, load_reuse_cases, run_recorded

CASES = [case for model in MODELS for case in load_reuse_cases(model) if case.is_scheduled]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(engine: Callable[[str], LLM], case: ReuseCase) -> None:
    run = run_recorded(engine(case.model), [case])[case.name]
    for number, (got, expected) in enumerate(zip(run.history, case.history, strict=False)):
        assert {key: got[key] for key in expected} == expected, number
    assert len(run.history) == len(case.history)
    assert run.tokens == case.expected
