"""A scheduler without an engine, and requests whose steps cost nothing."""

import random
from collections import defaultdict
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.engine.golden_cases import GOLDEN
from vllm_sparsed.scheduling.scheduler import DenoisingScheduler
from vllm_sparsed.worker.request_state import RequestState
from vllm_sparsed.worker.step_output import DenoisingOutput, StepReport

CONTEXT = 640


def make_config(budget: int = CONTEXT, **options: Any) -> VllmConfig:
    usual: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": budget,
        "max_num_seqs": 32,
        "attention_backend": "sparsed",
        "additional_config": {"sparsed": {"block_size": 16, "select": 0.5}},
        "skip_tokenizer_init": True,
    }
    return EngineArgs(model=str(GOLDEN / "llada-mha"), **(usual | options)).create_engine_config()


def make_request(
    name: str, prompt_len: int, canvas: int, steps: int, priority: int = 0, **args: Any
) -> Request:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=canvas,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={"diffusion_steps": steps, "diffusion_block_length": canvas, **args},
    )
    return Request(
        request_id=name,
        prompt_token_ids=[5 + len(name) % 7] * prompt_len,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        priority=priority,
    )


class SchedulerLoop:
    """Runs a scheduler as the engine does; a step decides the lowest candidates.

    Attributes:
        steps: engine steps so far that had requests in them.
        steps_of: of each request, the engine steps that it took part in.
        states: what a worker would know.
        tokens, reasons, outputs: what each client got; of the outputs the last.
        faults: what the worker reports of a request in place of a step.
    """

    def __init__(self, config: VllmConfig) -> None:
        config.cache_config.num_gpu_blocks = 1
        self.scheduler = DenoisingScheduler(
            config,
            KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[]),
            StructuredOutputManager(config),
            block_size=16,
            log_stats=True,
        )
        self.budget = self.scheduler.settings.max_batch_tokens
        self.store = self.scheduler.settings.store
        self.steps = 0
        self.steps_of: dict[str, list[int]] = defaultdict(list)
        self.states: dict[str, RequestState] = {}
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.outputs: dict[str, EngineCoreOutput] = {}
        self.faults: dict[str, StepReport] = {}

    def add(self, *args: Any, **options: Any) -> None:
        self.scheduler.add_request(make_request(*args, **options))

    def run(self, steps: int | None = None) -> None:
        """So many engine steps, or until nothing is left to do."""
        while self.scheduler.has_requests() and steps != 0:
            self.step()
            steps = None if steps is None else steps - 1

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        result = self._execute(output)
        for core_outputs in self.scheduler.update_from_output(output, result).values():
            for core_output in core_outputs.outputs:
                name = core_output.request_id
                self.tokens[name] += core_output.new_token_ids
                self.outputs[name] = core_output
                if core_output.finish_reason is not None:
                    assert name not in self.reasons, "it ends once"
                    self.reasons[name] = str(core_output.finish_reason)
        return output

    def _execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        for name in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.states.pop(name, None)
        for data in output.scheduled_new_reqs:
            assert data.req_id not in self.states
            self.states[data.req_id] = RequestState.from_request(data, self.scheduler.settings)
        new = {data.req_id for data in output.scheduled_new_reqs}
        names = list(output.num_scheduled_tokens)
        assert new | set(output.scheduled_cached_reqs.req_ids) == set(names)
        assert sum(output.num_scheduled_tokens.values()) == output.total_num_scheduled_tokens
        assert output.total_num_scheduled_tokens <= self.budget
        if not names:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if self.store is not None:
            held = sum(state.plan.num_pattern_rows for state in self.states.values())
            assert held <= self.store.total_rows
        reports = dict(self.faults)
        for name in names:
            self.steps_of[name].append(self.steps)
            if name in self.faults:
                continue
            state = self.states[name]
            decided = [-1] * state.candidates.size
            for i in range(min(state.selections[0].quota if state.decides() else 0, len(decided))):
                decided[i] = 3 + int(state.candidates[i]) % 100
            reports[name] = StepReport("dense", len(decided), sum(x >= 0 for x in decided))
            state.commit(np.array(decided))
        self.steps += 1
        return DenoisingOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[
                [] if name in self.faults else self.states[name].take_output() for name in names
            ],
            reports={name: report for name, report in reports.items() if name in names},
        )

    def assert_empty(self) -> None:
        self.run()
        scheduler = self.scheduler
        scheduler.schedule()
        assert not scheduler.requests and not scheduler.running and not scheduler.waiting
        assert not scheduler._progress
        assert not self.states


def random_arguments(rng: random.Random) -> dict[str, Any]:
    """Of a request that may be asked for."""
    prompt_len = min(CONTEXT - 1, int(rng.paretovariate(0.7)))
    return {
        "prompt_len": prompt_len,
        "canvas": rng.randint(1, min(CONTEXT - prompt_len, 64)),
        "steps": rng.choice([1, 2, 5, 9]),
        "priority": rng.choice([0, 0, 1, 5]),
        "diffusion_cfg_scale": rng.choice([0, 0, 0, 0.5]),
        "sparsed_enabled": rng.random() < 0.8,
        "diffusion_block_length": rng.choice([1, 5, 32, 1000]),
    }
