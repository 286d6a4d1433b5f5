"""Requests of the offline interface, where no HTTP layer has looked at the parameters before."""

from collections.abc import Callable

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

PROMPT = {"prompt_token_ids": [10, 11, 12]}


@pytest.mark.parametrize("name", ["seed", "top_k", "stream_interval", "diffusion_steps"])
def test_integers_beyond_the_digits_that_python_prints(
    engine: Callable[[str], LLM], name: str
) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=8, detokenize=False)
    if name == "diffusion_steps":
        params.extra_args = {name: 10**5000}
    else:
        setattr(params, name, 10**5000)
    with pytest.raises(VLLMValidationError) as refusal:
        engine("llada-mha").generate(PROMPT, params, use_tqdm=False)
    assert name in str(refusal.value)
    assert "a number of too many digits" in str(refusal.value)


def test_without_max_tokens_the_canvas_is_the_default(engine: Callable[[str], LLM]) -> None:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=None,
        ignore_eos=True,
        detokenize=False,
        extra_args={"diffusion_steps": 4},
    )
    (output,) = engine("llada-mha").generate(PROMPT, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 128


def test_default_sampling_params(engine: Callable[[str], LLM]) -> None:
    """Those of a diffusion model, not the 16 tokens at temperature 1 of `SamplingParams()`."""
    defaults = engine("llada-mha").get_default_sampling_params()
    assert (defaults.max_tokens, defaults.temperature, defaults.seed) == (128, 0.0, None)
