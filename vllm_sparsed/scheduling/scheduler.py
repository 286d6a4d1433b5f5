"""Continuous batching at the granularity of denoising steps."""

import itertools
import time
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType
from vllm.v1.request import Request, RequestStatus

from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.logger import init_logger
from vllm_sparsed.planning.request_plan import RequestPlan, plan_request
from vllm_sparsed.scheduling.metrics import StepCounters
from vllm_sparsed.scheduling.pages import RequestPages

logger = init_logger(__name__)


@dataclass(slots=True)
class _Progress:
    """A running request's plan and the denoising steps it has been scheduled for."""

    plan: RequestPlan
    step: int = 0


class DenoisingScheduler(Scheduler):
    """Schedules one denoising step of every running request in every engine step.

    A request reserves its tokens (prompt and canvas; twice where it is guided) for as long as it
    runs, and is admitted once they fit `max_num_batched_tokens` and its block patterns fit the
    pattern store: what runs always fits. Waiting requests are admitted strictly in the order of
    the policy (FCFS or priority): none is overtaken, so none starves. A request that keeps keys and
    values takes all its pages when it is admitted; a preempted one gives them back and starts again
    at its first step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = engine_settings(self.vllm_config)
        self._vocab_size = self.vllm_config.model_config.get_vocab_size()
        self._progress: dict[str, _Progress] = {}
        self._counters = StepCounters.for_writing(self.vllm_config)
        self._num_unseeded = itertools.count()
        self._pages = RequestPages(self.kv_cache_manager, self.kv_cache_config.num_blocks)

    def add_request(self, request: Request) -> None:
        """Queue a request; one that could not be run is finished as an error, harming no other.

        These are streaming-input sessions, whose canvas has no known length, and token ids outside
        the vocabulary, which vLLM's front end lets through where it has no tokenizer.
        """
        self._seed(request)
        super().add_request(request)
        tokens = request.prompt_token_ids
        if (
            request.resumable
            or not tokens
            or not 0 <= min(tokens) <= max(tokens) < self._vocab_size
        ):
            # vLLM's own list of requests that update_from_output is to finish as errors.
            self.grammar_compile_error_reqs.add(request.request_id)

    def _seed(self, request: Request) -> None:
        """Give a request without a seed one from the engine's and the order of arrival.

        It stays with the request through preemptions and goes to every worker. Engines of data
        parallelism draw differently. Where the engine has no seed it is random.
        """
        params = request.sampling_params
        # vLLM reads -1 as no seed.
        if params is None or params.seed not in (None, -1):
            return
        parallel = self.vllm_config.parallel_config
        sequence = np.random.SeedSequence(
            self.vllm_config.model_config.seed,
            spawn_key=(parallel.data_parallel_index, next(self._num_unseeded)),
        )
        # A copy: the children of n > 1 may share one object.
        request.sampling_params = copy(params)
        request.sampling_params.seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Pick the requests of one engine step.

        Args:
            throttle_prefills: vLLM's balancing of prefills over data-parallel ranks; denoising has
                none, so it is ignored.
        """
        self.current_step += 1
        now = time.monotonic()
        for request_id in self.finished_req_ids | self.reset_preempted_req_ids:
            self._progress.pop(request_id, None)

        admitted: list[Request] = []
        continuing = list(self.running)
        if self._pause_state == PauseState.PAUSED_ALL:
            continuing = []
        elif self._pause_state == PauseState.UNPAUSED:
            admitted = self._admit(now)

        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = [
            NewRequestData.from_request(
                request,
                self._pages.block_ids(request, self._progress[request.request_id].plan),
                list(request.all_token_ids),
            )
            for request in admitted
        ]
        output.scheduled_cached_reqs = CachedRequestData(
            req_ids=[request.request_id for request in continuing],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None] * len(continuing),
            num_computed_tokens=[request.num_computed_tokens for request in continuing],
            num_output_tokens=[request.num_output_tokens for request in continuing],
        )
        dense_steps = sparse_steps = 0
        for request in continuing + admitted:
            progress = self._progress[request.request_id]
            tokens = progress.plan.reserved_tokens
            output.num_scheduled_tokens[request.request_id] = tokens
            output.total_num_scheduled_tokens += tokens
            request.num_in_flight_tokens += tokens
            request.is_prefill_chunk = False
            if progress.plan.is_sparse_step(progress.step):
                sparse_steps += 1
            else:
                dense_steps += 1
            progress.step += 1
        self._counters.add(dense_steps, sparse_steps)

        output.finished_req_ids = self.finished_req_ids
        output.preempted_req_ids = self.reset_preempted_req_ids
        # New sets, not clear(): the output that is on its way to the workers holds the old ones.
        self.finished_req_ids: set[str] = set()
        self.reset_preempted_req_ids: set[str] = set()
        self.prev_step_scheduled_req_ids = set(output.num_scheduled_tokens)
        return output

    def _admit(self, now: float) -> list[Request]:
        """Move requests from waiting to running while their reservations fit."""
        plans = [self._progress[request.request_id].plan for request in self.running]
        free_tokens = self.settings.max_batch_tokens - sum(p.reserved_tokens for p in plans)
        free_rows = self.settings.store.num_rows if self.settings.store else 0
        free_rows -= sum(plan.num_pattern_rows for plan in plans)

        admitted: list[Request] = []
        while self.waiting and len(self.running) < self.max_num_active_reqs:
            request = self.waiting.peek_request()
            if request.request_id in self.grammar_compile_error_reqs:
                break
            progress = self._progress.get(request.request_id)
            if progress is None:
                progress = self._plan(request)
            plan = progress.plan
            if plan.reserved_tokens > free_tokens or plan.num_pattern_rows > free_rows:
                break
            if not self._pages.take(request, plan):
                break
            free_tokens -= plan.reserved_tokens
            free_rows -= plan.num_pattern_rows
            self.waiting.pop_request()
            self.deferred_waiting.discard(request)
            if request.prefill_stats and request.num_preemptions == 0:
                request.prefill_stats.set(request.num_prompt_tokens, 0, 0)
            if self.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, now)
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            admitted.append(request)
        return admitted

    def _free_request_blocks(self, request: Request) -> None:
        """Also those of the request's second sequence, of which vLLM does not know."""
        self._pages.free(request)

    def _plan(self, request: Request) -> _Progress:
        assert request.prompt_token_ids is not None and request.sampling_params is not None
        plan = plan_request(request.prompt_token_ids, request.sampling_params, self.settings)
        logger.debug("Request %s attends %s", request.request_id, plan.attention)
        # A clamped canvas ends the request when it is full.
        request.max_tokens = min(request.max_tokens, plan.canvas_len)
        progress = _Progress(plan)
        self._progress[request.request_id] = progress
        return progress
