"""Paces against the plain loops, and what holds for all of them, on small random models."""

import random
from typing import Any

import pytest

from benchmarks.reference.generate import Sampling, generate_llada
from benchmarks.reference.paced import Pace
from tests.decoding.plain_engine import engine_settings, make_state
from tests.decoding.tiny_model import (
    MASK,
    VOCAB,
    TinyModel,
    paced_passes,
    passes_of,
    reference_request,
)
from vllm_sparsed.config.parameter_table import PACES, SEVERAL_BLOCKS_PACES
from vllm_sparsed.worker.request_state import RequestState

SETTINGS = engine_settings(MASK, max_model_len=256)
BOUNDS = {
    "threshold": (0.05, 0.3, 0.6, 0.95, 1.0),
    "factor": (0.3, 1.0, 2.5, 8.0),
    "entropy_bound": (0.0, 0.8, 3.0, 20.0, 1e6),
    "entropy_threshold": (0.3, 1.2, 2.0, 9.0),
}


class Case:
    """A random request with a pace, for both sides."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 9))]
        if rng.random() < 0.3:
            self.prompt[rng.randrange(len(self.prompt))] = MASK
        self.canvas = rng.randrange(1, 40)
        self.pace = rng.choice(sorted(PACES))
        self.alg = rng.choice(PACES[self.pace])
        self.bound = rng.choice(BOUNDS[self.pace])
        self.block_length = rng.choice([1, 4, 8, 32])
        self.steps = rng.choice([None, None, 1, 3, 10, 1000])
        self.sampling = Sampling(
            temperature=rng.choice([0.0, 0.0, 0.8]), cfg_scale=rng.choice([0.0, 0.0, 1.2])
        )
        several = self.pace in SEVERAL_BLOCKS_PACES and rng.random() < 0.5
        self.block_add = rng.choice([0.1, 0.5, 1.0]) if several else None
        self.block_full = rng.choice([None, 0.5]) if several else None

    @property
    def extra_args(self) -> dict[str, Any]:
        args = {
            f"diffusion_{self.pace}": self.bound,
            "diffusion_alg": self.alg,
            "diffusion_block_length": self.block_length,
            "diffusion_steps": self.steps,
            "diffusion_cfg_scale": self.sampling.cfg_scale,
            "diffusion_block_add": self.block_add,
            "diffusion_block_full": self.block_full,
            "sparsed_enabled": 0,
        }
        return {key: value for key, value in args.items() if value is not None}

    def state(self, sent: list[int] | None = None) -> RequestState:
        return make_state(
            SETTINGS,
            self.prompt,
            self.canvas,
            self.extra_args,
            sent=sent or [],
            name=f"case-{self.seed}",
            seed=self.seed,
            temperature=self.sampling.temperature,
        )

    def expected(self, model: TinyModel, shift: bool) -> list:
        pace = Pace(
            self.pace,
            self.bound,
            self.block_length,
            self.steps,
            margin=self.alg == "topk_margin",
            block_add=self.block_add,
            block_full=0.95 if self.block_full is None else self.block_full,
        )
        request = reference_request(
            model, self.prompt, self.canvas, self.sampling, self.seed, shift
        )
        return paced_passes(request, pace)


@pytest.mark.parametrize("shift", [False, True], ids=["llada", "dream"])
@pytest.mark.parametrize("start", range(0, 150, 50))
def test_any_request_equals_the_plain_loop(start: int, shift: bool) -> None:
    for seed in range(start, start + 50):
        case, model = Case(seed), TinyModel(seed)
        engine, state = model.engine(shift), case.state()
        engine.run([state])
        assert engine.history[state] == case.expected(model, shift), (seed, case.extra_args)


def scheduled_state(seed: int, sent: list[int] | None = None) -> RequestState:
    rng = random.Random(seed)
    args = {
        "diffusion_alg": rng.choice(["low_confidence", "random", "origin", "entropy"]),
        "diffusion_steps": rng.choice([1, 5, 16]),
        "diffusion_block_length": rng.choice([4, 16, 64]),
        "diffusion_cfg_scale": rng.choice([0.0, 0.7]),
        "sparsed_enabled": 0,
    }
    prompt = [rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 9))]
    return make_state(
        SETTINGS,
        prompt,
        rng.randrange(1, 40),
        args,
        sent=sent or [],
        name=f"scheduled-{seed}",
        seed=seed,
        temperature=rng.choice([0.0, 0.6]),
    )


def make(kind: str, seed: int, sent: list[int] | None = None) -> RequestState:
    return Case(seed).state(sent) if kind == "paced" else scheduled_state(seed, sent)


@pytest.mark.parametrize("schedule", range(12))
def test_any_interleaving_decides_the_same(schedule: int) -> None:
    """Paces, schedules and guidance in one batch; joining, taking turns, preempted."""
    rng = random.Random(schedule)
    model = TinyModel(99)
    requests = [(kind, rng.randrange(10_000)) for kind in ["paced"] * 7 + ["scheduled"] * 5]
    alone = {}
    for request in requests:
        state = make(*request)
        (output,) = model.engine().run([state])
        alone[request] = (output, state.num_passes)

    engine = model.engine()
    waiting, outputs = list(requests), {request: [] for request in requests}
    running: list[tuple[tuple[str, int], RequestState, bool]] = []
    while waiting or running:
        if waiting and rng.random() < 0.4:
            request = waiting.pop()
            running.append((request, make(*request), False))
        if running and rng.random() < 0.1:
            place = rng.randrange(len(running))
            request = running[place][0]
            running[place] = (request, make(*request, outputs[request]), True)
        turn = [entry for entry in running if rng.random() < 0.7]
        rng.shuffle(turn)
        for (request, state, preempted), part in zip(
            turn, engine.step([state for _, state, _ in turn]), strict=True
        ):
            outputs[request] += part
            if state.finished:
                expected, passes = alone[request]
                assert outputs[request] == expected
                assert state.num_passes <= passes if preempted else state.num_passes == passes
        running = [entry for entry in running if not entry[1].finished]


PLAIN = {"diffusion_block_length": 8, "sparsed_enabled": 0}


def run(
    extra_args: dict[str, Any], model: TinyModel, canvas: int = 32
) -> tuple[RequestState, list]:
    engine = model.engine()
    state = make_state(SETTINGS, [1, 2, 3], canvas, PLAIN | extra_args)
    engine.run([state])
    return state, engine.history[state]


class NeverTheMask(TinyModel):
    """The mask token is no row's best."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.out[:, MASK] = 0.0

    def logits(self, tokens: Any, masks: Any = None) -> Any:
        logits, layers = super().logits(tokens, masks)
        logits[:, MASK] = -30.0
        return logits, layers


class OftenTheMask(TinyModel):
    """The mask token is the best of many rows."""

    def logits(self, tokens: Any, masks: Any = None) -> Any:
        logits, layers = super().logits(tokens, masks)
        logits[:, MASK] += 3.0
        return logits, layers


class AlwaysTheMask(TinyModel):
    """The mask token is every row's best."""

    def logits(self, tokens: Any, masks: Any = None) -> Any:
        logits, layers = super().logits(tokens, masks)
        logits[:, MASK] = 40.0
        return logits, layers


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("args", "passes"),
    [
        ({"diffusion_threshold": 1.0}, 32),
        ({"diffusion_entropy_bound": 0}, 32),
        ({"diffusion_entropy_threshold": 1e-9}, 32),
        ({"diffusion_factor": 1e-6}, 32),
        ({"diffusion_threshold": 1e-9}, 4),
        ({"diffusion_entropy_bound": 1e300}, 4),
        ({"diffusion_entropy_threshold": 1e300}, 4),
        ({"diffusion_factor": 1e300}, 4),
    ],
    ids=str,
)
def test_one_token_or_one_block_a_pass(args: dict[str, float], passes: int, seed: int) -> None:
    state, history = run(args, NeverTheMask(seed))
    assert state.num_passes == passes
    assert {len(decided) for decided in history} == {32 // passes}


@pytest.mark.parametrize("steps", [None, 1, 4, 7, 12, 1000])
@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("kind", [NeverTheMask, AlwaysTheMask, TinyModel])
def test_passes_never_exceed_masks_or_steps(kind: type[TinyModel], pace: str, steps) -> None:
    for seed, bound in enumerate(BOUNDS[pace]):
        args = {f"diffusion_{pace}": bound, "diffusion_steps": steps}
        state, history = run({k: v for k, v in args.items() if v is not None}, kind(seed))
        assert state.num_passes == len(history) <= min(32, max(4, steps or 32))
        assert state.finished and len(state.take_output()) == 0
        if kind is AlwaysTheMask:
            assert state.num_decided == 0
        if kind is NeverTheMask:
            assert state.num_decided == 32
            # Every pass but the last of a capped block decides at least one token.
            assert all(history)


def test_the_last_pass_that_the_cap_allows_decides_all_that_is_left() -> None:
    _, history = run({"diffusion_threshold": 1.0, "diffusion_steps": 12}, NeverTheMask(1))
    assert [len(decided) for decided in history] == [1, 1, 6] * 4


@pytest.mark.parametrize("alg", ["low_confidence", "random"])
@pytest.mark.parametrize("seed", range(20))
def test_what_a_block_leaves_over_stays_a_candidate(seed: int, alg: str) -> None:
    """LLaDA's loop on a prompt of one token: a mask as the candidate leaves masks behind."""
    model, canvas = OftenTheMask(seed), 24
    args = {
        "diffusion_alg": alg,
        "diffusion_steps": 12,
        "diffusion_block_length": 6,
        "sparsed_enabled": 0,
    }
    state = make_state(SETTINGS, [seed % MASK], canvas, args, seed=seed)
    engine = model.engine()
    (output,) = engine.run([state])
    request = reference_request(model, [seed % MASK], canvas, Sampling(), seed, False)
    expected = passes_of(
        generate_llada(request, steps=12, block_length=6, alg=alg), len(request.prompt)
    )
    assert engine.history[state] == expected
    assert len(output) == canvas
    for position, token in [entry for decided in expected for entry in decided]:
        assert output[position] == token


def test_left_over_masks_are_decided_later_in_some_of_them() -> None:
    later = 0
    for seed in range(20):
        engine = OftenTheMask(seed).engine()
        args = {"diffusion_steps": 12, "diffusion_block_length": 6, "sparsed_enabled": 0}
        state = make_state(SETTINGS, [seed % MASK], 24, args)
        engine.run([state])
        for number, decided in enumerate(engine.history[state]):
            later += sum(position // 6 < number // 3 for position, _ in decided)
    assert later > 0


def test_what_the_client_has_is_not_given_or_changed_again() -> None:
    """Also where a pass that is run again would decide otherwise, as in other precisions."""
    for seed in range(30):
        case = Case(seed)
        first = TinyModel(seed).engine()
        state = case.state()
        sent: list[int] = []
        while len(sent) < case.canvas // 2:
            sent += first.step([state])[0]
        resumed = case.state(sent)
        (rest,) = TinyModel(seed + 1000).engine().run([resumed])
        assert len(sent) + len(rest) == case.canvas
        canvas = resumed.tokens[len(case.prompt) :].tolist()
        assert canvas[len(sent) :] == rest
        # One that this run leaves a mask stays one: the steps behind it are to see what the first
        # run's saw, which decided it later.
        for mine, theirs in zip(canvas, sent, strict=False):
            assert mine in (theirs, SETTINGS.mask_token_id)
