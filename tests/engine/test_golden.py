"""The golden cases come out of the engine token for token, and the patterns bit for bit."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM

from tests.engine.golden_cases import GOLDEN, MODELS, GoldenCase, load_cases
from tests.engine.inspection import runner_of

CASES = [case for model in MODELS for case in load_cases(model)]
SPARSE_CASES = [case for case in CASES if case.block_mask]


def generate(llm: LLM, cases: list[GoldenCase]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        [case.sampling_params() for case in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(engine: Callable[[str], LLM], case: GoldenCase) -> None:
    assert generate(engine(case.model), [case]) == [case.expected]


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("model", MODELS)
def test_in_one_batch_in_any_order(engine: Callable[[str], LLM], model: str, order: int) -> None:
    cases = load_cases(model)
    random.Random(order).shuffle(cases)
    assert generate(engine(model), cases) == [case.expected for case in cases]


@pytest.mark.parametrize("after_steps", [1, 5, 9])
@pytest.mark.parametrize("model", MODELS)
def test_after_a_forced_preemption(
    engine: Callable[[str], LLM], model: str, after_steps: int
) -> None:
    llm = engine(model)
    cases = load_cases(model)
    for case in cases:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    tokens: dict[str, list[int]] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        if steps == after_steps:
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    assert steps > after_steps
    assert tokens == {case.name: case.expected for case in cases}


@pytest.mark.parametrize("case", SPARSE_CASES, ids=lambda case: case.name)
def test_patterns(engine: Callable[[str], LLM], case: GoldenCase) -> None:
    """The kept blocks are those of the released code, bit for bit."""
    llm = engine(case.model)
    runner = runner_of(llm)
    assert runner.store is not None and case.block_mask is not None
    expected = load_file(GOLDEN / "block_masks.safetensors")[case.block_mask]
    llm.llm_engine.add_request(case.name, {"prompt_token_ids": case.prompt}, case.sampling_params())
    pattern: torch.Tensor | None = None
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        for state in runner.requests.values():
            if state.pattern_rows:
                rows = state.pattern_rows[0]
                pattern = _mask(runner.store.indices[:, rows], runner.store.counts[:, rows])
    assert pattern is not None
    assert torch.equal(pattern, expected.bool())
    density = pattern.float().mean().item()
    assert np.isclose(density, expected.float().mean().item())


def _mask(indices: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool [layers, heads, query blocks, key blocks] from index lists of all rows of a request."""
    layers, rows, heads, _ = indices.shape
    mask = torch.zeros(layers, heads, rows, rows, dtype=torch.bool)
    for layer in range(layers):
        for row in range(rows):
            for head in range(heads):
                kept = indices[layer, row, head, : counts[layer, row, head]].long()
                assert torch.equal(kept, kept.unique()), "ascending, each once"
                mask[layer, head, row, kept] = True
    return mask
