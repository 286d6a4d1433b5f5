"""SparseD with a pace: the pass that builds, its patterns, and what they lead to."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.reference.generate import Request
from benchmarks.reference.paced import Pace, generate_paced
from benchmarks.reference.sparse_pattern import PacedSparseSequence, SparseSettings
from tests.decoding.plain_engine import PlainEngine, engine_settings, golden_model, make_state
from tests.decoding.tiny_model import passes_of
from vllm_sparsed.planning.crossover import Prediction
from vllm_sparsed.worker.request_state import Attention, RequestState

PACES = {
    "threshold": 0.05,
    "factor": 5.7,
    "entropy_bound": 15.0,
    "entropy_threshold": 5.0,
}
CANVAS, BLOCK = 64, 16


def arguments(pace: str, skip: float) -> dict[str, float | str]:
    return {
        f"diffusion_{pace}": PACES[pace],
        "diffusion_alg": "maskgit_plus",
        "diffusion_block_length": BLOCK,
        "sparsed_skip": skip,
        "sparsed_select": 0.3,
        "sparsed_block_size": 16,
    }


def paced_state(
    model: str, pace: str, skip: float, prompt: list[int], sent: list[int] | None = None
) -> RequestState:
    settings = engine_settings(golden_model(model).dimensions.mask_token_id)
    return make_state(
        settings, prompt, CANVAS, arguments(pace, skip), sent=sent or [], name=f"{pace}-{skip}"
    )


def prompt_of(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 383) for _ in range(rng.choice([17, 100]))]


@pytest.mark.parametrize("skip", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
def test_patterns_are_built_where_the_reference_does(model: str, pace: str, skip: float) -> None:
    plain = golden_model(model)
    prompt = prompt_of(len(pace) + int(10 * skip))
    sequence = PacedSparseSequence(
        plain, CANVAS, plain.dimensions.mask_token_id, SparseSettings(skip, 0.3, 16)
    )
    request = Request(
        new_sequence=lambda: sequence,
        prompt=torch.tensor(prompt),
        canvas_len=CANVAS,
        mask_token_id=plain.dimensions.mask_token_id,
        logit_shift=plain.dimensions.logit_shift,
    )
    steps = generate_paced(request, Pace(pace, PACES[pace], BLOCK))
    expected = passes_of(steps, len(prompt), plain.dimensions.mask_token_id)
    assert sequence.built_in is not None and sequence.patterns is not None

    engine = PlainEngine.of_golden(model)
    state = paced_state(model, pace, skip, prompt)
    engine.run([state])
    assert engine.history[state] == expected
    assert engine.built_in[state] == sequence.built_in
    (patterns,) = engine.patterns[state]
    assert torch.equal(torch.stack(patterns), torch.stack(sequence.patterns))

    # In its words: the first that begins with the share decided, never the first of all.
    decided = 0
    for number, tokens in enumerate(expected):
        if number > 0 and decided / CANVAS >= skip:
            assert number == sequence.built_in
            break
        decided += len(tokens)


def test_a_preempted_request_builds_the_same_patterns() -> None:
    """The passes up to the one that builds are taken again; blocks behind it that the client has
    are not."""
    prompt = prompt_of(1)
    engine = PlainEngine.of_golden("llada-mha")
    state = paced_state("llada-mha", "threshold", 0.2, prompt)
    (whole,) = engine.run([state])
    for stop in (1, 20, 40, 63):
        resumed = paced_state("llada-mha", "threshold", 0.2, prompt, whole[:stop])
        (rest,) = engine.run([resumed])
        assert whole[:stop] + rest == whole
        assert resumed.num_passes <= state.num_passes
        assert engine.built_in[resumed] == engine.built_in[state]
        assert torch.equal(
            torch.stack(engine.patterns[resumed][0]), torch.stack(engine.patterns[state][0])
        )
    assert resumed.num_passes < state.num_passes


@pytest.mark.parametrize(
    ("sparse", "build", "expected"),
    [(0.1, 1.0, True), (0.99, 1.0, False), (0.1, 12.0, False)],
    ids=["pays", "never", "not-for-what-is-left"],
)
def test_whether_it_pays_is_decided_from_what_is_left(
    sparse: float, build: float, expected: bool
) -> None:
    prompt = prompt_of(2)
    state = paced_state("llada-mha", "threshold", 0.5, prompt)
    state.plan = replace(state.plan, prediction=Prediction(1.0, sparse, build))
    engine = PlainEngine.of_golden("llada-mha")
    engine.run([state])
    assert (state in engine.built_in) == expected
    dense_state = paced_state("llada-mha", "threshold", 0.5, prompt)
    dense_state.plan = replace(dense_state.plan, num_pattern_rows=0)
    engine.run([dense_state])
    same = engine.history[dense_state] == engine.history[state]
    assert same != expected


def test_rows_are_reserved_for_what_may_become_sparse() -> None:
    state = paced_state("llada-mha", "factor", 0.2, prompt_of(3))
    assert state.plan.num_pattern_rows == -(-state.plan.seq_len // 16)
    assert state.attention == Attention.DENSE
    settings = engine_settings(383)
    for extra in ({"sparsed_enabled": 0}, {"diffusion_steps": 1, "diffusion_block_length": 64}):
        args = arguments("factor", 0.2) | extra
        assert make_state(settings, [5] * 9, CANVAS, args).plan.num_pattern_rows == 0


def test_a_scheduled_request_s_plan_knows_its_pattern_step() -> None:
    args = {"diffusion_steps": 10, "sparsed_skip": 0.2, "sparsed_block_size": 16}
    state = make_state(engine_settings(383), [5] * 9, CANVAS, args)
    assert (state.plan.pattern_step, state.plan.prediction) == (3, None)
