"""What a request asked for reaches the rows that are decoded."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import SamplingParams

from vllm_sparsed.config.parameters import parse_server_settings, request_parameters
from vllm_sparsed.worker.step_rows import StepRows

SERVER = parse_server_settings({}, "entropy")


def state(params: SamplingParams) -> Any:
    return SimpleNamespace(
        params=params,
        plan=SimpleNamespace(parameters=request_parameters(params.extra_args, SERVER)),
        seed=1,
        step=0,
        candidates=np.arange(3),
        unmask_probability=lambda: 1.0,
    )


def test_top_p_and_top_k_by_request() -> None:
    """At temperature 0 vLLM drops its own; ours, where given, take their place anywhere."""
    ours = {"diffusion_top_p": 0.5, "diffusion_top_k": 7}
    all_params = [
        SamplingParams(temperature=0, top_p=0.9, top_k=20),
        SamplingParams(temperature=0.5, top_p=0.9, top_k=20),
        SamplingParams(temperature=0, extra_args=ours),
        SamplingParams(temperature=0.5, top_p=0.9, top_k=20, extra_args=ours),
        SamplingParams(temperature=0.5, top_p=0.9, top_k=20, extra_args={"diffusion_top_k": 0}),
    ]
    states = [state(params) for params in all_params]
    rows = StepRows().decode_rows(states, [1] * len(states))
    assert rows.top_p.tolist() == [1.0, 0.9, 0.5, 0.5, 0.9]
    assert rows.top_k.tolist() == [0, 20, 7, 7, 0]
