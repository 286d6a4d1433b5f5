"""Weights are loaded again into a running engine."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vllm import LLM

from tests.engine.golden_cases import GOLDEN, MODELS, load_cases
from tests.engine.inspection import Rerun, runner_of


def generate(llm: LLM, model: str) -> list[list[int]]:
    """The answers to the model's golden prompts."""
    cases = load_cases(model)
    outputs = llm.generate(
        [{"prompt_token_ids": case.prompt} for case in cases],
        [case.sampling_params() for case in cases],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("model", MODELS)
def test_reload(engine: Callable[[str], LLM], model: str, tmp_path: Path) -> None:
    """The same weights, those of another checkpoint, and the first ones again."""
    llm = engine(model)
    expected = [case.expected for case in load_cases(model)]
    llm.collective_rpc("reload_weights")
    assert generate(llm, model) == expected

    shutil.copy(GOLDEN / model / "config.json", tmp_path)
    weights = load_file(GOLDEN / model / "model.safetensors")
    others = {
        name: weight.flip(0).contiguous() if weight.ndim == 2 else weight
        for name, weight in weights.items()
    }
    save_file(others, tmp_path / "model.safetensors")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
    changed = generate(llm, model)
    assert changed != expected
    assert changed == generate(engine(str(tmp_path)), model), "an engine that started with them"

    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(GOLDEN / model)})
    assert generate(llm, model) == expected


@pytest.mark.parametrize(
    "replaced",
    [
        pytest.param(lambda llm: llm.collective_rpc("reload_weights"), id="reload"),
        # What vLLM calls at the end of a transfer of weights.
        pytest.param(lambda llm: runner_of(llm).reset_lora_state(), id="transfer"),
    ],
)
def test_recorded_passes_are_forgotten(
    engine: Callable[[str], LLM], replaced: Callable[[LLM], object]
) -> None:
    """New weights may lie at new places."""
    llm = engine("llada-mha")
    runner = runner_of(llm)
    runner.record_passes(4096, Rerun)
    try:
        generate(llm, "llada-mha")
        assert runner.graphs is not None
        assert len(runner.graphs) > 0
        replaced(llm)
        assert len(runner.graphs) == 0
        assert generate(llm, "llada-mha") == [case.expected for case in load_cases("llada-mha")]
    finally:
        runner.graphs = None
