"""What a request asked for reaches the rows that are decoded."""

from typing import Any

from tests.decoding.plain_engine import engine_settings, make_state
from vllm_sparsed.worker.step_candidates import StepCandidates

SETTINGS = engine_settings(383)


def test_top_p_and_top_k_by_request() -> None:
    """At temperature 0 vLLM drops its own; ours, where given, take their place anywhere."""
    ours = {"diffusion_top_p": 0.5, "diffusion_top_k": 7}
    asked: list[tuple[float, dict[str, Any]]] = [
        (0.0, {}),
        (0.5, {}),
        (0.0, ours),
        (0.5, ours),
        (0.5, {"diffusion_top_k": 0}),
    ]
    states = [
        make_state(SETTINGS, [10, 11], 8, extra_args, temperature=temperature, top_p=0.9, top_k=20)
        for temperature, extra_args in asked
    ]
    candidates = StepCandidates().of(states)
    assert candidates.top_p.tolist() == [1.0, 0.9, 0.5, 0.5, 0.9]
    assert candidates.top_k.tolist() == [0, 20, 7, 7, 0]
