"""Random schedules of requests, aborts and preemptions: nothing hangs, leaks or goes missing."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.interface import PauseState

from tests.engine.golden_cases import GoldenCase, load_cases
from tests.engine.inspection import MAX_MODEL_LEN, runner_of
from vllm_sparsed.config.parameter_table import PACES, SEVERAL_BLOCKS_PACES
from vllm_sparsed.worker.packing import MAX_BATCHES

NUM_SCHEDULES = 200
MAX_STEPS = 3000


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams]:
    """Any prompt and canvas that the context holds, with any steps, pace, blocks and sparsity."""
    prompt_len = min(MAX_MODEL_LEN - 1, int(rng.paretovariate(0.7)))
    max_tokens = rng.choice([1, 2, 7, 16, 31, 64, MAX_MODEL_LEN])
    prompt = [rng.randrange(3, 383) for _ in range(prompt_len)]
    if rng.random() < 0.2:
        prompt[rng.randrange(prompt_len)] = 383
    args: dict[str, Any] = {
        "diffusion_steps": rng.choice([1, 2, 5, 9]),
        "diffusion_alg": rng.choice(
            ["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]
        ),
        "sparsed_enabled": int(rng.random() < 0.8),
        "sparsed_skip": rng.choice([0.0, 0.2, 0.5]),
        "sparsed_select": rng.choice([0.1, 0.5]),
        "sparsed_block_size": rng.choice([16, 32, 64, 128]),
    }
    if rng.random() < 0.7:
        args["diffusion_block_length"] = rng.choice([1, 5, 32, 1000])
    if rng.random() < 0.2:
        args["diffusion_cfg_scale"] = 0.5
    if rng.random() < 0.4:
        pace = rng.choice(sorted(PACES))
        args[f"diffusion_{pace}"] = rng.choice({"threshold": [0.05, 1.0]}.get(pace, [1.0, 5.0, 20]))
        args["diffusion_alg"] = rng.choice(PACES[pace])
        args["diffusion_steps"] = rng.choice([None, None, 5])
        if pace in SEVERAL_BLOCKS_PACES and rng.random() < 0.3:
            args["diffusion_block_add"] = rng.choice([0.1, 0.5])
    if 383 in prompt:
        args["diffusion_infill"] = 1
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        seed=rng.randrange(1000),
        max_tokens=max_tokens,
        ignore_eos=rng.random() < 0.7,
        detokenize=False,
        extra_args=args,
    )
    return prompt, params


def run_schedule(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    waiting = [random_request(rng) for _ in range(rng.randrange(1, 7))]
    expected: dict[str, tuple[int, SamplingParams]] = {}
    finished: dict[str, Any] = {}
    aborted: set[str] = set()
    steps = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        if waiting and rng.random() < 0.5:
            prompt, params = waiting.pop()
            name = f"{seed}-{len(waiting)}"
            expected[name] = (len(prompt), params)
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        if expected and rng.random() < 0.05:
            name = rng.choice(sorted(expected))
            llm.llm_engine.abort_request([name])
            aborted.add(name)
        if rng.random() < 0.03:
            llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        steps += 1
        assert steps < MAX_STEPS, "a request hangs"

    for name, (prompt_len, params) in expected.items():
        if name not in finished:
            assert name in aborted
            continue
        completion = finished[name].outputs[0]
        canvas = min(params.max_tokens or 0, MAX_MODEL_LEN - prompt_len)
        if (params.extra_args or {}).get("diffusion_infill"):
            canvas += prompt_len
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == canvas
        elif completion.finish_reason == "stop":
            assert len(completion.token_ids) <= canvas and completion.token_ids[-1] == 2
        else:
            assert completion.finish_reason == "abort" and name in aborted
    assert_empty(llm)


def assert_empty(llm: LLM) -> None:
    llm.llm_engine.step()  # tells the worker of what finished last
    runner = runner_of(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not runner.requests and not scheduler.requests and not scheduler._progress
    assert runner.store is not None
    assert runner.store.num_free_rows == runner.store.size.total_rows
    assert len(set(runner.store._free)) == runner.store.size.total_rows


@pytest.mark.parametrize("start", range(0, NUM_SCHEDULES, 50))
def test_random_schedules(engine: Callable[[str], LLM], start: int) -> None:
    llm = engine("llada-mha" if start % 100 == 0 else "dream-gqa")
    for seed in range(start, start + 50):
        run_schedule(llm, seed)


def test_same_tokens_alone_and_among_requests_in_every_phase(
    engine: Callable[[str], LLM],
) -> None:
    """Golden requests joining at random steps: dense, building and sparse ones share batches."""
    llm = engine("llada-mha")
    rng = random.Random(5)
    queue: list[GoldenCase] = load_cases("llada-mha") * 2
    rng.shuffle(queue)
    expected, tokens = {}, {}
    while queue or llm.llm_engine.has_unfinished_requests():
        if queue and rng.random() < 0.6:
            case = queue.pop()
            name = f"{case.name}-{len(queue)}"
            expected[name] = case.expected
            llm.llm_engine.add_request(
                name, {"prompt_token_ids": case.prompt}, case.sampling_params()
            )
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert tokens == expected


def test_random_draws_do_not_depend_on_the_batch(engine: Callable[[str], LLM]) -> None:
    """The same seed gives the same tokens alone, in a batch and after a preemption."""
    llm = engine("dream-gqa")
    rng = random.Random(11)
    requests = []
    for _ in range(6):
        prompt, params = random_request(rng)
        params.temperature, params.max_tokens = 0.9, 24
        assert params.extra_args is not None
        for pace in ("entropy_bound", "entropy_threshold", "threshold", "factor"):
            params.extra_args.pop(f"diffusion_{pace}", None)
        params.extra_args["diffusion_alg_temp"] = 0.3
        requests.append((prompt[:300], params))
    alone = [
        list(
            llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
            .outputs[0]
            .token_ids
        )
        for prompt, params in requests
    ]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    for index, (prompt, params) in enumerate(requests):
        llm.llm_engine.add_request(f"draw-{index}", {"prompt_token_ids": prompt}, params)
    together: dict[str, list[int]] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        if steps == 2:
            llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            together[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
    assert [together[f"draw-{index}"] for index in range(len(alone))] == alone


def test_tokens_outside_the_vocabulary_fail_that_request_alone(
    engine: Callable[[str], LLM],
) -> None:
    llm = engine("llada-mha")
    case = load_cases("llada-mha")[0]
    prompts = [{"prompt_token_ids": case.prompt}, {"prompt_token_ids": [5, 384]}]
    try:
        outputs = llm.generate(prompts, case.sampling_params(), use_tqdm=False)
    except VLLMValidationError:  # from 0.33 on, vLLM's front end sees to it
        outputs = llm.generate(prompts[:1], case.sampling_params(), use_tqdm=False)
    else:
        assert outputs[1].outputs[0].finish_reason == "error"
    assert list(outputs[0].outputs[0].token_ids) == case.expected
    assert_empty(llm)


def test_pause_and_resume(engine: Callable[[str], LLM]) -> None:
    llm = engine("llada-mha")
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    case = load_cases("llada-mha")[0]
    llm.llm_engine.add_request("paused", {"prompt_token_ids": case.prompt}, case.sampling_params())
    llm.llm_engine.step()
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    for _ in range(3):
        assert not scheduler.schedule().num_scheduled_tokens
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    llm.llm_engine.add_request("later", {"prompt_token_ids": case.prompt}, case.sampling_params())
    scheduled = scheduler.schedule()
    assert len(scheduled.num_scheduled_tokens) == 1, "running requests go on, new ones wait"
    scheduler.reset_prefix_cache(reset_running_requests=True)
    scheduler.set_pause_state(PauseState.UNPAUSED)
    tokens: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    assert tokens == {"paused": case.expected, "later": case.expected}


def test_a_long_request_is_not_starved_by_short_ones(engine: Callable[..., LLM]) -> None:
    """Ever new short ones fill the budget; one as long as the context still gets its turns."""
    llm = engine("llada-mha", MAX_MODEL_LEN)
    rng = random.Random(3)

    def add(name: str, prompt_len: int) -> None:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=8,
            ignore_eos=True,
            detokenize=False,
            extra_args={"diffusion_steps": 8},
        )
        prompt = [rng.randrange(3, 383) for _ in range(prompt_len)]
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)

    for index in range(8):
        add(f"short-{index}", 130)
    add("long", MAX_MODEL_LEN - 8)
    ended: list[str] = []
    late = 0
    while "long" not in ended:
        for _ in range(2 if late < 150 else 0):
            add(f"late-{late}", 130)
            late += 1
        ended += [output.request_id for output in llm.llm_engine.step() if output.finished]
    # A ninth of the tokens is its share at first, a sixteenth later.
    assert len(ended) < 16 * 8
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    assert_empty(llm)


def min_tokens_first(cases: list[GoldenCase]) -> list[GoldenCase]:
    return sorted(cases, key=lambda case: case.params["steps"] * len(case.prompt))


def test_same_tokens_in_turns(engine: Callable[..., LLM]) -> None:
    """Golden requests beside one that fills the budget alone: 48 engine steps for 16 of its own."""
    llm = engine("llada-mha", MAX_MODEL_LEN)
    cases = load_cases("llada-mha")
    long = SamplingParams(
        temperature=0.0,
        max_tokens=240,
        ignore_eos=True,
        detokenize=False,
        extra_args={"diffusion_block_length": 240},
    )
    llm.llm_engine.add_request("long", {"prompt_token_ids": [7] * 400}, long)
    steps = {}
    for case in min_tokens_first(cases)[:3]:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
        tokens, count = None, 0
        while tokens is None:
            count += 1
            for output in llm.llm_engine.step():
                if output.request_id == case.name and output.finished:
                    tokens = list(output.outputs[0].token_ids)
        assert tokens == case.expected
        steps[case.name] = count, case.params["steps"]
    assert all(count <= 3 * own for count, own in steps.values()), steps
    # All at once, each with its turns.
    for case in cases:
        llm.llm_engine.add_request(
            case.name, {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    together: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            together[output.request_id] = list(output.outputs[0].token_ids)
    assert len(together.pop("long")) == 240
    assert together == {case.name: case.expected for case in cases}
    assert_empty(llm)


def test_batches_that_come_again_are_found_again(engine: Callable[..., LLM]) -> None:
    llm = engine("llada-mha", MAX_MODEL_LEN)
    packer = runner_of(llm).packer
    built: list[int] = []
    build = packer._build
    packer._build = lambda *arguments: built.append(1) or build(*arguments)  # type: ignore
    try:
        for index, length in enumerate((600, 500, 24)):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=20,
                ignore_eos=True,
                detokenize=False,
                extra_args={"diffusion_block_length": 20, "sparsed_enabled": 0},
            )
            llm.llm_engine.add_request(f"turn-{index}", {"prompt_token_ids": [7] * length}, params)
        steps = 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            steps += 1
            assert len(packer._batches) <= MAX_BATCHES
    finally:
        del packer._build
    # Each alone, and the short one beside the second.
    assert len(built) <= 4 < 40 < steps
    assert_empty(llm)
    assert not packer._batches, "nothing is kept of what is gone"


def test_masks_that_a_block_left_over_after_a_preemption(engine: Callable[[str], LLM]) -> None:
    """With a mask in the prompt all blocks are run again, where what was left over is a mask."""
    llm = engine("llada-mha")
    params = SamplingParams(
        temperature=0.0,
        max_tokens=189,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "diffusion_steps": 2,
            "diffusion_block_length": 5,
            "sparsed_enabled": 0,
            "diffusion_infill": 1,
        },
    )
    tokens = []
    for preempted_after in (0, 20, 30):
        llm.llm_engine.add_request(
            f"left-{preempted_after}", {"prompt_token_ids": [156, 366, 383]}, params
        )
        steps, last = 0, []
        while llm.llm_engine.has_unfinished_requests():
            if steps and steps == preempted_after:
                llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
            for output in llm.llm_engine.step():
                last = list(output.outputs[0].token_ids)
            steps += 1
        tokens.append(last)
    assert tokens[0] == tokens[1] == tokens[2]
    assert_empty(llm)
