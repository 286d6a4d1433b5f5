"""On a GPU: no first step waits for a compiler, and serving stays below the peak measured at start.

python -m pytest -m gpu -s tests/engine/test_first_use.py
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.golden_engine import start_golden
from tests.engine.inspection import MAX_MODEL_LEN, runner_of
from vllm_sparsed.worker.startup import measure_memory

pytestmark = pytest.mark.gpu

LONGEST = 0.1
"""Seconds of a step that is not noticed."""

ALGORITHMS = ["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]


def longest_step(llm: LLM, prompt: list[int], params: SamplingParams) -> float:
    llm.llm_engine.add_request("first", {"prompt_token_ids": prompt}, params)
    longest = 0.0
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        llm.llm_engine.step()
        longest = max(longest, time.perf_counter() - start)
    return longest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_requests_do_not_wait_for_a_compiler(dtype: str) -> None:
    """A fresh engine, and no request before the first of each kind."""
    llm = start_golden("llada-mha", dtype=dtype, enforce_eager=True)
    times: dict[str, float] = {}
    options: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "greedy": ({}, {}),
        "sampled": ({"temperature": 0.7}, {}),
        "top_p": ({"temperature": 0.7, "top_p": 0.9}, {}),
        "top_k": ({"temperature": 0.7, "top_k": 5}, {}),
        "both": ({"temperature": 0.7, "top_p": 0.9, "top_k": 5}, {}),
        "guided": ({}, {"diffusion_cfg_scale": 0.5}),
        "alg_temp": ({}, {"diffusion_alg_temp": 0.5}),
        "no end": ({}, {"diffusion_logits_eos_inf": 1}),
        "end last": ({}, {"diffusion_confidence_eos_eot_inf": 1}),
    }
    try:
        for alg in ALGORITHMS:
            for name, (sampling, args) in options.items():
                params = SamplingParams(
                    **{"temperature": 0.0, "max_tokens": 16, "ignore_eos": True, **sampling},
                    seed=1,
                    detokenize=False,
                    extra_args={"diffusion_steps": 8, "diffusion_alg": alg, **args},
                )
                times[f"{alg} {name}"] = longest_step(llm, [7] * 150, params)
    finally:
        llm.llm_engine.engine_core.shutdown()
    for name, seconds in sorted(times.items(), key=lambda item: -item[1])[:10]:
        print(f"{dtype} {name}: longest step {seconds * 1e3:.1f} ms")
    assert max(times.values()) < LONGEST


def test_serving_stays_below_the_measured_peak(engine: Callable[..., LLM]) -> None:
    llm = engine("llada-mha")
    runner = runner_of(llm)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    baseline, context = worker.memory_before()
    peak = measure_memory(runner, None, baseline, context)
    assert baseline is not None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for index in range(24):
        params = SamplingParams(
            temperature=0.8,
            top_p=0.9,
            top_k=50,
            seed=index,
            max_tokens=MAX_MODEL_LEN // 2,
            ignore_eos=True,
            detokenize=False,
            extra_args={
                "diffusion_steps": 8,
                "diffusion_alg": "entropy",
                "diffusion_cfg_scale": 1.0 if index % 2 else 0.0,
            },
        )
        prompt = [7] * (MAX_MODEL_LEN // 2 if index % 3 else 40)
        llm.llm_engine.add_request(f"heavy-{index}", {"prompt_token_ids": prompt}, params)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved() - baseline.non_torch_memory
    taken = torch.cuda.max_memory_reserved() + max(0, outside) + context
    print(f"serving {taken / 2**20:.0f} MiB, measured {peak / 2**20:.0f} MiB")
    assert taken <= peak
