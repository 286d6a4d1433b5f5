"""Keys and values kept between passes: the golden tokens, rows and attention of each pass."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.reuse import Reuse, _Loop
from tests.engine.golden_cases import GOLDEN, MODELS, load_cases
from tests.engine.inspection import Rerun, runner_of
from tests.engine.reuse_cases import (
    Recorded,
    ReuseCase,
    load_reuse_cases,
    plain_pace,
    plain_sparse,
    run_recorded,
)
from vllm_sparsed.attention.pages import PAGE_SIZE, split_pages

CASES = [case for model in MODELS for case in load_reuse_cases(model)]
WINDOW = [case for case in CASES if "refresh_tokens" in case.params]


def check(run: Recorded, case: ReuseCase) -> None:
    for number, (got, expected) in enumerate(zip(run.history, case.history, strict=False)):
        assert {key: got[key] for key in expected} == expected, (case.name, number)
    assert len(run.history) == len(case.history)
    assert run.tokens == case.expected


def free_pages(llm: LLM) -> int:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    count: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return count


@pytest.fixture
def poisoned(engine: Callable[[str], LLM]) -> Callable[[str], LLM]:
    """The engines, with NaN in all pages: what is read before it is written shows."""

    def get(model: str) -> LLM:
        llm = engine(model)
        for pages in runner_of(llm).kv_caches:
            pages.fill_(torch.nan)
        return llm

    return get


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_alone(poisoned: Callable[[str], LLM], case: ReuseCase) -> None:
    check(run_recorded(poisoned(case.model), [case])[case.name], case)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_in_one_batch_beside_requests_that_keep_nothing(
    poisoned: Callable[[str], LLM], model: str, order: int
) -> None:
    llm = poisoned(model)
    free = free_pages(llm)
    cases = load_reuse_cases(model)
    random.Random(order).shuffle(cases)
    others = load_cases(model)[:3]
    for case in others:
        llm.llm_engine.add_request(
            f"none-{case.name}", {"prompt_token_ids": case.prompt}, case.sampling_params()
        )
    others_tokens: dict[str, list[int]] = {}
    runs = run_recorded(llm, cases, others=others_tokens)
    for case in cases:
        check(runs[case.name], case)
    assert others_tokens == {f"none-{case.name}": case.expected for case in others}
    assert free_pages(llm) == free


@pytest.mark.parametrize("after_steps", [2, 9])
@pytest.mark.parametrize("model", MODELS)
def test_after_a_forced_preemption(
    poisoned: Callable[[str], LLM], model: str, after_steps: int
) -> None:
    llm = poisoned(model)
    free = free_pages(llm)
    cases = load_reuse_cases(model)
    runs = run_recorded(llm, cases, preempt_after=after_steps)
    for case in cases:
        assert runs[case.name].tokens == case.expected, case.name
        # Its passes are taken again from the first one on.
        assert [entry["rows"] for entry in runs[case.name].history[-len(case.history) :]] == [
            entry["rows"] for entry in case.history
        ]
    assert free_pages(llm) == free


@pytest.mark.parametrize("scale", [0, 0.5])
@pytest.mark.parametrize("model", MODELS)
def test_a_refresh_after_every_token_is_none(
    engine: Callable[[str], LLM], model: str, scale: float
) -> None:
    """Sparse requests too; with guidance both sequences."""
    llm = engine(model)
    changes = {"diffusion_kv_reuse": "window", "diffusion_refresh_tokens": 1}
    tokens: list[list[list[int]]] = []
    for extra in ({}, changes):
        params = []
        for case in load_cases(model):
            one = case.sampling_params()
            one.extra_args |= {"diffusion_cfg_scale": scale, **extra}
            params.append(one)
        prompts = [{"prompt_token_ids": case.prompt} for case in load_cases(model)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("case", WINDOW[::5], ids=lambda case: case.name)
def test_stored_values_of_every_pass(engine: Callable[[str], LLM], case: ReuseCase) -> None:
    """After each pass the pages hold, layer by layer, what a plain loop stores."""
    llm = engine(case.model)
    runner = runner_of(llm)
    model = ReferenceModel.load(GOLDEN / case.model, torch.float32)
    params = case.params
    expected: list[list[torch.Tensor]] = []

    class Recording(_Loop):
        def run_pass(self, *arguments: Any, **options: Any) -> None:
            super().run_pass(*arguments, **options)
            expected.append([torch.cat((x.key, x.value), dim=-1).clone() for x in self.stored])

    reuse = Reuse(
        "window",
        params["warmup"],
        params["refresh_tokens"],
        params.get("refresh_passes"),
        params["margin"],
    )
    prompt = torch.tensor(case.prompt)
    loop = Recording(
        model, prompt, params["gen"], params["block"], plain_pace(case), reuse, plain_sparse(case)
    )
    loop.run()

    number = 0

    def compare(states: Any) -> None:
        nonlocal number
        (state,) = states
        for layer, wanted in enumerate(expected[number]):
            keys, values = split_pages(runner.kv_caches[layer], wanted.shape[-1] // 2)
            stored = torch.cat((keys, values), dim=-1)[state.kept.pages[0]].flatten(0, 1)
            got = stored[: state.plan.seq_len].transpose(0, 1).cpu()
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)
        number += 1

    run_recorded(llm, [case], after_pass=compare)
    assert number == len(expected)


@pytest.mark.parametrize("mode", ["prefix", "dual", "window"])
@pytest.mark.parametrize("model", MODELS)
def test_guided_halves_in_turn_are_one_pass(
    engine: Callable[..., LLM], model: str, mode: str
) -> None:
    """Both sequences have pages of their own; where they do not fit together they take turns."""
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=48,
        seed=7,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "diffusion_cfg_scale": 1.5,
            "diffusion_steps": 24,
            "diffusion_block_length": 16,
            "diffusion_kv_reuse": mode,
            "sparsed_skip": 0.1,
        },
    )
    prompt = {"prompt_token_ids": list(range(3, 303))}
    together = engine(model).generate([prompt], sampling, use_tqdm=False)
    runner = runner_of(engine(model))
    settings = runner.settings
    # As with a smaller token budget, which would take another engine.
    runner.settings = type(settings)(
        **{name: getattr(settings, name) for name in settings.__slots__} | {"max_batch_tokens": 640}
    )
    try:
        in_turn = engine(model).generate([prompt], sampling, use_tqdm=False)
    finally:
        runner.settings = settings
    assert list(in_turn[0].outputs[0].token_ids) == list(together[0].outputs[0].token_ids)


def test_aborted_requests_leave_no_page(engine: Callable[[str], LLM]) -> None:
    llm = engine("llada-mha")
    free = free_pages(llm)
    case = WINDOW[0]
    ids = []
    for number in range(3):
        name = f"abort-{number}"
        params = case.sampling_params(**({"diffusion_cfg_scale": 1.0} if number else {}))
        ids.append(
            llm.llm_engine.add_request(name, {"prompt_token_ids": case.prompt}, params) or name
        )
        llm.llm_engine.step()
    pages = -(-(len(case.prompt) + case.params["gen"]) // PAGE_SIZE)
    assert free - free_pages(llm) == pages * 5, "a guided request has pages for two sequences"
    llm.llm_engine.abort_request([f"abort-{number}" for number in range(3)])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    llm.llm_engine.step()
    assert free_pages(llm) == free


@pytest.mark.parametrize("model", MODELS)
def test_window_passes_that_are_recorded_and_replayed(
    poisoned: Callable[[str], LLM], model: str
) -> None:
    """Padded to few sizes, so that windows of other blocks and requests find the same graph."""
    llm = poisoned(model)
    runner = runner_of(llm)
    runner.record_passes(1024, Rerun)
    try:
        assert runner.graphs is not None
        cases = [case for case in load_reuse_cases(model) if "refresh_tokens" in case.params]
        for case in cases[::3]:
            check(run_recorded(llm, [case])[case.name], case)
        alone = runner.graphs.num_replays
        assert alone > 0
        runs = run_recorded(llm, cases)
        for case in cases:
            check(runs[case.name], case)
        assert runner.graphs.num_replays > alone
        padded = [graph.batch for graph in runner.graphs._graphs.values()]
        # Batches with whole sequences beside windows have their own sizes.
        metadata = {batch.num_tokens: next(iter(batch.attention.values())) for batch in padded}
        sizes = {
            n for n, of in metadata.items() if of.windows and not (of.dense_bounds or of.tiles)
        }
        assert sizes and all(size % 32 == 0 for size in sizes)
    finally:
        runner.graphs = None
        runner.packer.pad_windows(0)


def with_options(case: ReuseCase, name: str, mode: str, **options: Any) -> ReuseCase:
    """A request of the case's prompt in a mode, with other options than any golden case has."""
    params: dict[str, Any] = {"gen": 48, "block": 16, "alg": "low_confidence", "steps": 24}
    if mode == "window":
        params |= {"refresh_tokens": 16, "margin": 4, "warmup": 1}
    else:
        params["cache"] = mode
    return replace(case, name=name, params=params, other=options)


@pytest.mark.parametrize("mode", ["prefix", "dual", "window"])
@pytest.mark.parametrize("model", MODELS)
def test_other_options_alone_and_in_a_batch(
    engine: Callable[[str], LLM], model: str, mode: str
) -> None:
    """Drawn tokens and order, guidance, several blocks at once and masks inside the prompt take the
    same passes in any company."""
    llm = engine(model)
    runner = runner_of(llm)
    case = next(case for case in WINDOW if case.model == model and len(case.prompt) == 90)
    masks = [runner.settings.mask_token_id] * 5
    masked = replace(case, prompt=[*case.prompt[:5], *masks, *case.prompt[5:20]])
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    pace = {"diffusion_alg": "maskgit_plus", "diffusion_steps": None}
    several = {**pace, "diffusion_threshold": 0.05, "diffusion_block_add": 0.1}
    cases = [
        with_options(case, "drawn", mode, **drawn, diffusion_alg="origin"),
        with_options(case, "random", mode, seed=4, diffusion_alg="random"),
        with_options(case, "guided", mode, diffusion_cfg_scale=1.5),
        with_options(case, "several", mode, **several),
        with_options(masked, "masked", mode, diffusion_infill=True),
        with_options(case, "few-step", mode, diffusion_steps=6),
        with_options(case, "one-step", mode, diffusion_steps=3, diffusion_alg="entropy"),
    ]
    alone = {case.name: run_recorded(llm, [case])[case.name] for case in cases}
    together = run_recorded(llm, cases)
    for name, run in alone.items():
        assert len(run.tokens) >= 48, name
        assert name == "one-step" or any(x["rows"] != "full" for x in run.history), name
        decided = {position for entry in run.history for position, _ in entry["decided"]}
        assert len(decided) == 48 or not name.endswith("step"), f"{name}: a mask is left"
        assert together[name] == run, name
    inside = set(range(5, 10))
    for entry in alone["masked"].history:
        if inside:
            assert entry["rows"] == "full"
        inside -= {position + 25 for position, _ in entry["decided"]}
    assert not inside
