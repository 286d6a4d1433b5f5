"""Requests without a seed: a run repeats itself, and no two requests draw alike."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from tests.engine.inspection import MAX_BATCH_TOKENS, runner_of

PROMPT = [10, 11, 12, 13, 14]
NUM_REQUESTS = 3

# Dream's own algorithm draws which positions it decides, too.
DRAWN = {
    "origin": SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, detokenize=False),
    "order-alone": SamplingParams(
        temperature=0.0,
        max_tokens=24,
        ignore_eos=True,
        detokenize=False,
        extra_args={"diffusion_alg": "random", "diffusion_steps": 6},
    ),
}


def generate(llm: LLM, *params: SamplingParams) -> list[list[int]]:
    """The completions of one prompt with each of the parameters, all in one call."""
    prompts = [{"prompt_token_ids": PROMPT} for _ in params]
    outputs = llm.generate(prompts, list(params), use_tqdm=False)
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def scheduler_of(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture
def llm(engine: Callable[[str], LLM], monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An engine that has not seen a request without a seed."""
    llm = engine("dream-gqa")
    monkeypatch.setattr(scheduler_of(llm), "_num_unseeded", itertools.count())
    return llm


def start_again(llm: LLM) -> None:
    scheduler_of(llm)._num_unseeded = itertools.count()


def test_a_second_engine_repeats_the_run_of_the_first(engine: Callable[..., LLM]) -> None:
    params = DRAWN["origin"]
    runs = []
    # Token budgets that no other test asks for: engines just started.
    for budget in (MAX_BATCH_TOKENS - 1, MAX_BATCH_TOKENS - 2):
        llm = engine("dream-gqa", budget)
        together = generate(llm, params, params, params)
        runs.append([*together, *generate(llm, params), *generate(llm, DRAWN["order-alone"])])
    assert runs[0] == runs[1]
    assert len({tuple(tokens) for tokens in runs[0]}) == len(runs[0])


@pytest.mark.parametrize("params", DRAWN.values(), ids=DRAWN)
def test_order_of_arrival_decides_alone(llm: LLM, params: SamplingParams) -> None:
    """Neither the batch nor requests with a seed, before or between, change a draw."""
    together = generate(llm, *[params] * NUM_REQUESTS)
    assert len({tuple(tokens) for tokens in together}) == NUM_REQUESTS
    assert params.seed is None
    start_again(llm)
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=8, detokenize=False)
    alone = []
    for _ in range(NUM_REQUESTS):
        generate(llm, seeded)
        alone += generate(llm, params)
    assert alone == together


def test_choices_of_one_request_differ(llm: LLM) -> None:
    params = DRAWN["origin"].clone()
    params.n = NUM_REQUESTS
    choices = generate(llm, params)
    assert len({tuple(tokens) for tokens in choices}) == NUM_REQUESTS
    start_again(llm)
    assert generate(llm, params) == choices
    start_again(llm)
    assert generate(llm, *[DRAWN["origin"]] * NUM_REQUESTS) == choices


@pytest.mark.parametrize("params", DRAWN.values(), ids=DRAWN)
def test_a_preempted_request_draws_the_same_again(llm: LLM, params: SamplingParams) -> None:
    undisturbed = generate(llm, *[params] * NUM_REQUESTS)
    start_again(llm)
    for index in range(NUM_REQUESTS):
        llm.llm_engine.add_request(f"again-{index}", {"prompt_token_ids": PROMPT}, params)
    tokens: dict[str, list[int]] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        if steps == 3:
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    assert steps > 3
    assert [tokens[f"again-{index}"] for index in range(NUM_REQUESTS)] == undisturbed


def test_engine_seed_and_data_parallel_engine_count(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, config = DRAWN["origin"], scheduler_of(llm).vllm_config
    runs = []
    for seed, index in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(config.model_config, "seed", seed)
        monkeypatch.setattr(config.parallel_config, "data_parallel_index", index)
        start_again(llm)
        runs.append(generate(llm, params)[0])
    assert len({tuple(tokens) for tokens in runs}) == 3
    assert runs[0] == runs[3]


def test_an_engine_without_a_seed_does_not_repeat_itself(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_of(llm).vllm_config.model_config, "seed", None)
    first = generate(llm, DRAWN["origin"])
    start_again(llm)
    assert generate(llm, DRAWN["origin"]) != first


def test_minus_one_is_no_seed(llm: LLM) -> None:
    """vLLM's own convention; it survives where a child of n > 1 comes to it by counting."""
    llm.llm_engine.add_request("x", {"prompt_token_ids": PROMPT}, DRAWN["origin"])
    (request,) = scheduler_of(llm).requests.values()
    request.sampling_params.seed = -1
    scheduler_of(llm)._seed(request)
    assert request.sampling_params.seed >= 0
    llm.llm_engine.step()
    (state,) = runner_of(llm).requests.values()
    assert state.seed == request.sampling_params.seed
    llm.llm_engine.abort_request(["x"])
    llm.llm_engine.step()


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
def test_seeds_at_the_ends_of_their_range(llm: LLM, seed: int) -> None:
    params = DRAWN["origin"].clone()
    params.seed, params.n = seed, NUM_REQUESTS
    choices = generate(llm, params)
    assert len({tuple(tokens) for tokens in choices}) == NUM_REQUESTS
    assert generate(llm, params) == choices
