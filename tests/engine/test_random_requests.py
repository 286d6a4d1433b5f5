"""Thousands of random requests of several clients in one engine, with aborts and preemptions.

python -m pytest -m slow -s tests/engine/test_random_requests.py
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.core import EngineCore

from tests.engine.inspection import runner_of

CONTEXT = 192
BUDGET = 256
NUM_CLIENTS = 4
NUM_KINDS = 150
ALGORITHMS = ["low_confidence", "random", "origin", "maskgit_plus", "topk_margin", "entropy"]


@dataclass(frozen=True)
class Kind:
    """A request that may be asked for many times, and is answered alike each time."""

    prompt: list[int]
    params: SamplingParams


@dataclass
class Run:
    """What has become of the requests of an engine.

    Attributes:
        tokens: what each client got so far.
        reasons: of those that have ended.
        clients: whose request it is.
    """

    core: EngineCore
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[str, FinishReason] = field(default_factory=dict)
    clients: dict[str, int] = field(default_factory=dict)
    steps: int = 0
    tokens_computed: int = 0

    def add(self, name: str, kind: Kind, rng: random.Random) -> None:
        self.clients[name] = rng.randrange(NUM_CLIENTS)
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=kind.prompt,
            mm_features=None,
            # Each from a client of its own: nothing is shared.
            sampling_params=kind.params.clone(),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            client_index=self.clients[name],
            priority=rng.choice([0, 0, 0, -5, 7, 2**40]),
        )
        self.core.add_request(*self.core.preprocess_add_request(request))

    def step(self) -> None:
        outputs, _ = self.core.step_fn()
        self.steps += 1
        for client, of_client in (outputs or {}).items():
            for output in of_client.outputs:
                assert self.clients[output.request_id] == client
                self.take(output)

    def take(self, output: EngineCoreOutput) -> None:
        name = output.request_id
        assert name not in self.reasons, "nothing comes after the end"
        self.tokens[name] += output.new_token_ids
        if output.finish_reason is not None:
            self.reasons[name] = output.finish_reason


def random_kind(rng: random.Random) -> Kind:
    prompt_len = min(CONTEXT - 1, int(3 * rng.paretovariate(0.7)))
    prompt = [rng.randrange(3, 383) for _ in range(prompt_len)]
    if rng.random() < 0.1:
        prompt[rng.randrange(prompt_len)] = 383
    args: dict[str, Any] = {
        "diffusion_steps": rng.choice([1, 2, 4, 6]),
        "diffusion_alg": rng.choice(ALGORITHMS),
        "sparsed_enabled": int(rng.random() < 0.8),
        "sparsed_skip": rng.choice([0.0, 0.2, 0.5]),
        "sparsed_select": rng.choice([0.1, 0.5]),
        "sparsed_block_size": rng.choice([16, 32, 64]),
    }
    if rng.random() < 0.5:
        args["diffusion_block_length"] = rng.choice([5, 8, 32])
    if rng.random() < 0.15:
        args["diffusion_cfg_scale"] = 0.5
    if rng.random() < 0.15:
        args["diffusion_alg_temp"] = 0.3
    if rng.random() < 0.3 and args["diffusion_alg"] in ("low_confidence", "topk_margin"):
        args[rng.choice(["diffusion_threshold", "diffusion_factor"])] = 0.5
    if rng.random() < 0.3:
        args["diffusion_kv_reuse"] = rng.choice(["prefix", "dual", "window"])
        args["diffusion_block_length"] = rng.choice([5, 8])
    params = SamplingParams(
        temperature=rng.choice([0.0, 0.0, 0.7]),
        top_p=rng.choice([1.0, 1.0, 0.8]),
        top_k=rng.choice([0, 0, 5]),
        seed=rng.randrange(1000),
        max_tokens=rng.choice([1, 4, 8, 16, 24, CONTEXT]) if prompt_len < 150 else 8,
        ignore_eos=rng.random() < 0.7,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=args,
    )
    # As the front end does.
    params.update_from_generation_config({}, eos_token_id=2)
    return Kind(prompt, params)


def spoilt(kind: Kind, rng: random.Random) -> Kind:
    """As a client may send it that goes round the front end's check."""
    params = kind.params.clone()
    spoil = rng.choice(["steps", "unknown", "long", "vocabulary"])
    if spoil == "long":
        return Kind([5] * rng.choice([CONTEXT, 10 * CONTEXT]), params)
    if spoil == "vocabulary":
        return Kind([5, 384], params)
    bad = {"steps": {"diffusion_steps": 0}, "unknown": {"unheard_of": 1}}[spoil]
    params.extra_args = {**(params.extra_args or {}), **bad}
    return Kind(kind.prompt, params)


@pytest.mark.parametrize("num_requests", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_requests(engine: Callable[..., LLM], num_requests: int) -> None:
    """No engine death, no leak, no token that is not the one of the request alone."""
    llm = engine("llada-mha", BUDGET, max_model_len=CONTEXT, scheduling_policy="priority")
    core = llm.llm_engine.engine_core.engine_core
    pages = core.scheduler.kv_cache_manager.block_pool
    free_pages = pages.get_num_free_blocks()
    rng = random.Random(num_requests)
    kinds = [random_kind(rng) for _ in range(min(NUM_KINDS, num_requests // 5))]

    alone = Run(core)
    for i, kind in enumerate(kinds):
        alone.add(f"alone-{i}", kind, rng)
        while core.scheduler.has_requests():
            alone.step()
    expected = [
        (alone.tokens[f"alone-{i}"], alone.reasons[f"alone-{i}"]) for i in range(len(kinds))
    ]

    run = Run(core)
    asked: dict[str, int] = {}
    bad: set[str] = set()
    aborted: set[str] = set()
    preempted: set[str] = set()
    most = 0
    started = time.perf_counter()
    while len(asked) < num_requests or core.scheduler.has_requests():
        # Bursts and lulls: the queue is now long and now empty.
        wanted = rng.choice([0, 0, 1, 2, 9]) if len(core.scheduler.requests) < 60 else 0
        for _ in range(min(wanted, num_requests - len(asked))):
            name = f"{num_requests}-{len(asked)}"
            asked[name] = rng.randrange(len(kinds))
            kind = kinds[asked[name]]
            if rng.random() < 0.03:
                kind = spoilt(kind, rng)
                bad.add(name)
            run.add(name, kind, rng)
        if core.scheduler.requests and rng.random() < 0.05:
            names = rng.sample(sorted(core.scheduler.requests), 1)
            core.abort_requests(names)
            aborted.update(names)
        if rng.random() < 0.01:
            preempted.update(request.request_id for request in core.scheduler.running)
            core.scheduler.reset_prefix_cache(reset_running_requests=True)
        most = max(most, len(core.scheduler.running))
        run.step()
    seconds = time.perf_counter() - started

    ends: Counter[str] = Counter()
    changed: list[str] = []
    for name, index in asked.items():
        tokens, reason = expected[index]
        if name in bad:
            assert name in aborted or run.reasons[name] == FinishReason.ERROR
            assert not run.tokens[name]
        elif name not in run.reasons:
            assert name in aborted
            if tokens[: len(run.tokens[name])] != run.tokens[name]:
                changed.append(name)
        elif (run.tokens[name], run.reasons[name]) != (tokens, reason):
            changed.append(name)
        ends[str(run.reasons.get(name, FinishReason.ABORT))] += 1
    assert not changed, [
        (name, name in preempted, len(kinds[asked[name]].prompt), kinds[asked[name]].params)
        for name in changed
    ]
    core.step_fn()
    runner = runner_of(llm)
    assert not runner.requests and not core.scheduler.requests and not core.scheduler._progress
    assert not runner.packer._batches
    assert pages.get_num_free_blocks() == free_pages
    assert runner.store is not None
    assert sorted(runner.store._free) == list(range(runner.store.size.total_rows))
    print(
        f"{len(asked)} requests of {len(kinds)} kinds and {NUM_CLIENTS} clients: {dict(ends)}, "
        f"{len(preempted)} preempted, {run.steps} engine steps, up to {most} running, "
        f"{seconds:.0f} s"
    )
