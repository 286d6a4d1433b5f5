"""Continuous batching at the granularity of denoising steps."""

import itertools
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.sample.logits_processor import validate_logits_processors_parameters

from vllm_sparsed.attention.pattern_store import PatternStoreSize
from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.logger import init_logger
from vllm_sparsed.models.special_tokens import with_end_tokens
from vllm_sparsed.planning.request_plan import RequestPlan, plan_request
from vllm_sparsed.scheduling.metrics import StepCounters
from vllm_sparsed.scheduling.pages import RequestPages
from vllm_sparsed.scheduling.turns import FairTurns, Turn
from vllm_sparsed.worker.step_output import StepReport

logger = init_logger(__name__)

LEAST_WEIGHT: Final = 1 / 16
"""Share of a request of the lowest of many priorities, relative to one of the highest."""


@dataclass(slots=True)
class _Progress:
    """What the scheduler knows of a request that runs or waits.

    Attributes:
        next_tokens: tokens that its next step takes of the budget.
        next_cost: tokens that this step computes.
        next_is_window: whether it computes a window alone.
        step: denoising steps it has been scheduled for.
        turn: of a running request, else None.
    """

    plan: RequestPlan
    next_tokens: int
    next_cost: int
    next_is_window: bool = False
    step: int = 0
    turn: Turn | None = None


class DenoisingScheduler(Scheduler):
    """Schedules one denoising step of some of the running requests in every engine step.

    Requests run, up to `max_num_seqs`, that hold their rows of the pattern store; in each engine
    step those among them take a denoising step whose tokens (prompt and canvas; twice where a
    request is guided) fit `max_num_batched_tokens`, in turns that are fair by tokens
    (`FairTurns`). All others lose nothing: what a step needs is the request's own state.

    Waiting requests are admitted in the order of the policy (FCFS or priority). One that waits for
    rows of the store holds up only those that take theirs from the same half of it, so none is
    overtaken by one that takes what it waits for. So it is with pages: a request that keeps keys
    and values takes all of them when it is admitted. A preempted request starts again at its first
    step.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = engine_settings(self.vllm_config)
        self._vocab_size = self.vllm_config.model_config.get_vocab_size()
        self._end_token_ids = self.vllm_config.model_config.hf_config.end_token_ids
        self._progress: dict[str, _Progress] = {}
        # Why requests end as errors that have not been told so yet.
        self._errors: dict[str, str] = {}
        self._turns = FairTurns(self.settings.max_batch_tokens)
        self._window_turns = FairTurns(self.settings.max_batch_tokens)
        # Tokens of the budget that no pass over a whole sequence could use since one was put off.
        self._carried = 0
        # Whether a waiting request may be admitted that could not be when last looked for.
        self._may_admit = True
        self._counters = StepCounters.for_writing(self.vllm_config)
        self._num_unseeded = itertools.count()
        self._pages = RequestPages(self.kv_cache_manager, self.kv_cache_config.num_blocks)

    def add_request(self, request: Request) -> None:
        """Queue a request and plan it; one that cannot be planned ends as an error of its own.

        The front end's check refuses such requests earlier and better; here arrive those of clients
        that go round it, and token ids outside the vocabulary, which it lets through where it has
        no tokenizer.
        """
        known = self.requests.get(request.request_id)
        if known is not None and known.streaming_queue is None:
            logger.warning("Request %s is dropped: one of that id runs", request.request_id)
            return
        self._may_admit = True
        super().add_request(request)
        if known is not None:
            return
        try:
            self._begin(request, self._plan(request))
        except Exception as error:
            # What a client may put into a request by hand fails in many ways.
            self._fail(request.request_id, f"{error}" or type(error).__name__)

    def _plan(self, request: Request) -> RequestPlan:
        """Check and plan a request.

        Raises:
            ValueError: names what is wrong with it, as do other exceptions.
        """
        if request.resumable:
            raise ValueError("streaming input is not supported: a canvas has a known length")
        tokens, params = request.prompt_token_ids, request.sampling_params
        if not tokens or request.prompt_embeds is not None:
            raise ValueError("the prompt must be token ids")
        if params is None:
            raise ValueError("sampling parameters are missing")
        if not 0 <= min(tokens) <= max(tokens) < self._vocab_size:
            raise ValueError(f"the prompt has token ids outside [0, {self._vocab_size})")
        if len(tokens) >= self.settings.max_model_len:
            raise ValueError(
                f"the prompt of {len(tokens)} tokens leaves no room for an answer in a context of "
                f"{self.settings.max_model_len}"
            )
        validate_logits_processors_parameters(
            self.vllm_config.model_config.logits_processors, params
        )
        self._seed(request)
        assert request.sampling_params is not None
        request.sampling_params = with_end_tokens(request.sampling_params, self._end_token_ids)
        plan = plan_request(tokens, params, self.settings)
        logger.debug("Request %s attends %s", request.request_id, plan.attention)
        # A clamped canvas ends the request when it is full.
        request.max_tokens = plan.num_outputs
        return plan

    def _begin(self, request: Request, plan: RequestPlan) -> None:
        """Forget what a request has done, if anything: it starts at its first step."""
        self._progress[request.request_id] = _Progress(
            plan,
            next_tokens=plan.step_tokens,
            next_cost=plan.num_sequences * plan.seq_len,
        )

    def _fail(self, request_id: str, message: str) -> None:
        """End a request as an error, with the next update from the workers."""
        logger.warning("Request %s ends as an error: %s", request_id, message)
        self._errors[request_id] = message
        # vLLM's own list of requests that update_from_output is to finish as errors.
        self.grammar_compile_error_reqs.add(request_id)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """As vLLM's, after a look at what the workers report of each request."""
        reports: Mapping[str, StepReport] = getattr(model_runner_output, "reports", {})
        for request_id, report in reports.items():
            progress = self._progress.get(request_id)
            if progress is None:
                continue  # aborted meanwhile
            if report.error is not None:
                self._fail(request_id, report.error)
                continue
            self._counters.add(report, progress.plan.canvas_len)
            if report.next_tokens:
                progress.next_tokens = progress.next_cost = report.next_tokens
            progress.next_is_window = report.next_is_window
        errors = dict(self._errors)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if errors:
            for client_outputs in outputs.values():
                for output in client_outputs.outputs:
                    if output.finish_reason == FinishReason.ERROR:
                        # The one field of vLLM's that takes a text; the HTTP server hides it.
                        output.stop_reason = errors.get(output.request_id)
        return outputs

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        super()._preempt_request(request, timestamp, drop_stale_output)
        self._begin(request, self._progress[request.request_id].plan)
        self._may_admit = True

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self._progress.pop(request.request_id, None)
        # One that is aborted before it was told: its id may come again.
        self._errors.pop(request.request_id, None)
        self.grammar_compile_error_reqs.discard(request.request_id)
        self._may_admit = True
        return super()._free_request(request, delay_free_blocks)

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
        if self._pause_state == PauseState.UNPAUSED:
            self._admit(time.monotonic())
        chosen: list[Request] = []
        if self._pause_state != PauseState.PAUSED_ALL:
            chosen = self._choose()

        new = [request for request in chosen if self._progress[request.request_id].step == 0]
        continuing = [request for request in chosen if self._progress[request.request_id].step]
        output = SchedulerOutput.make_empty()
        output.scheduled_new_reqs = [
            NewRequestData.from_request(
                request,
                self._pages.block_ids(request, self._progress[request.request_id].plan),
                list(request.all_token_ids),
            )
            for request in new
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
        for request in chosen:
            progress = self._progress[request.request_id]
            tokens = progress.next_tokens
            output.num_scheduled_tokens[request.request_id] = tokens
            output.total_num_scheduled_tokens += tokens
            request.num_in_flight_tokens += tokens
            request.is_prefill_chunk = False
            progress.step += 1

        output.finished_req_ids = self.finished_req_ids
        output.preempted_req_ids = self.reset_preempted_req_ids
        # New sets, not clear(): the output that is on its way to the workers holds the old ones.
        self.finished_req_ids: set[str] = set()
        self.reset_preempted_req_ids: set[str] = set()
        self.prev_step_scheduled_req_ids = set(output.num_scheduled_tokens)
        return output

    def _choose(self) -> list[Request]:
        """The running requests that take part in this engine step, in the order of admission.

        First the window passes of all that keep keys and values, which cost little, then passes
        over whole sequences as turns and the budget that is left allow. What these leave unused is
        carried over: once it has added up to the pass of the request that is owed most, the windows
        wait for one engine step. So a refresh that does not fit waits, but not for ever.
        """
        windows: list[Request] = []
        whole: list[Request] = []
        for request, weight in zip(self.running, self._weights(), strict=True):
            progress = self._progress[request.request_id]
            if progress.turn is None:
                progress.turn = Turn(progress.next_tokens, progress.next_cost)
            turn = progress.turn
            turn.tokens, turn.cost, turn.weight = progress.next_tokens, progress.next_cost, weight
            (windows if progress.next_is_window else whole).append(request)
        if not windows:
            return self._take_turns(self._turns, whole)
        budget = self.settings.max_batch_tokens
        left = budget - sum(self._progress[r.request_id].next_tokens for r in windows)
        first = whole[self._turns.most_owed(self._turns_of(whole))] if whole else None
        if first is not None and self._carried >= self._progress[first.request_id].next_tokens:
            self._carried = 0
            return self._take_turns(self._turns, whole)
        chosen = windows
        if left < 0:
            chosen = self._take_turns(self._window_turns, windows)
            left = 0
        if first is None:
            return chosen
        others = self._take_turns(self._turns, whole, left)
        if first in others:
            self._carried = 0
        else:
            used = sum(self._progress[r.request_id].next_tokens for r in others)
            # At the least its share, where windows take all of the budget.
            self._carried += max(left - used, budget // len(self.running))
        taking_part = {*(r.request_id for r in chosen), *(r.request_id for r in others)}
        return [request for request in self.running if request.request_id in taking_part]

    def _turns_of(self, requests: Sequence[Request]) -> list[Turn]:
        turns = [self._progress[request.request_id].turn for request in requests]
        return [turn for turn in turns if turn is not None]

    def _take_turns(
        self, turns: FairTurns, requests: Sequence[Request], budget: int | None = None
    ) -> list[Request]:
        return [requests[i] for i in turns.choose(self._turns_of(requests), budget)]

    def _weights(self) -> Sequence[float]:
        """Shares of the running requests: with priorities each lower one has half the share."""
        if self.policy != SchedulingPolicy.PRIORITY:
            return [1.0] * len(self.running)
        ranks = {p: i for i, p in enumerate(sorted({r.priority for r in self.running}))}
        return [max(LEAST_WEIGHT, 0.5 ** ranks[request.priority]) for request in self.running]

    def _admit(self, now: float) -> None:
        """Move requests from waiting to running while a place and what they hold are free."""
        places = self.max_num_active_reqs - len(self.running)
        if not self.waiting or places <= 0 or not self._may_admit:
            return
        rows = _FreeRows(self.settings.store)
        for request in self.running:
            rows.take(self._progress[request.request_id].plan.num_pattern_rows)

        admitted: list[Request] = []
        may_take_pages = True
        for request in self.waiting:
            if request.request_id in self._errors:
                continue
            plan = self._progress[request.request_id].plan
            fits = rows.take_in_order(plan.num_pattern_rows)
            # One that waits for rows holds up none that wait for pages.
            if fits and self._pages.needed(plan):
                fits = may_take_pages = may_take_pages and self._pages.take(request, plan)
            if fits:
                admitted.append(request)
            if len(admitted) == places:
                break
        else:
            self._may_admit = False
        self.waiting.remove_requests(admitted)
        for request in admitted:
            self.deferred_waiting.discard(request)
            if request.prefill_stats and request.num_preemptions == 0:
                request.prefill_stats.set(request.num_prompt_tokens, 0, 0)
            if self.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, now)
            request.status = RequestStatus.RUNNING
            self.running.append(request)

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], is_stale: bool = False
    ) -> tuple[list[int], bool]:
        """As vLLM's; with infilling the part of the answer that repeats the prompt stops nothing,
        and does not count towards the context length."""
        progress = self._progress.get(request.request_id)
        if progress is None or not progress.plan.parameters.infill:
            return super()._update_request_with_output(request, new_token_ids, is_stale)
        prompt_len = progress.plan.prompt_len
        for num_new, token in enumerate(new_token_ids, 1):
            request.append_output_token_ids(token)
            if request.num_output_tokens > prompt_len and check_stop(
                request, self.max_model_len + prompt_len
            ):
                del new_token_ids[num_new:]
                return new_token_ids, True
        return new_token_ids, False

    def _free_request_blocks(self, request: Request) -> None:
        """Also those of the request's second sequence, of which vLLM does not know."""
        self._pages.free(request)


class _FreeRows:
    """Rows of the pattern store that requests may still take, of each half of the store.

    Long requests have one half and short ones the other: neither waits for the other.
    """

    def __init__(self, size: PatternStoreSize | None) -> None:
        self._max_short_rows = 0 if size is None else size.max_short_rows
        rows = 0 if size is None else size.num_rows
        self._free = {True: rows, False: rows}
        # Of which half a request that waits has been passed over.
        self._awaited = {True: False, False: False}

    def take(self, num_rows: int) -> None:
        """What a running request holds."""
        self._free[num_rows <= self._max_short_rows] -= num_rows

    def take_in_order(self, num_rows: int) -> bool:
        """Take rows for the next waiting request, unless an earlier one waits for the same rows."""
        if num_rows == 0:
            return True
        short = num_rows <= self._max_short_rows
        if self._awaited[short] or num_rows > self._free[short]:
            self._awaited[short] = True
            return False
        self._free[short] -= num_rows
        return True
