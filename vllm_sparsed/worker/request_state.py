"""What the model runner remembers of one request between denoising steps."""

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_sparsed.attention.metadata import WINDOW_ORDER, SequencePhase
from vllm_sparsed.config.parameter_table import BLOCK_FULL
from vllm_sparsed.config.settings import EngineSettings
from vllm_sparsed.decoding.algorithms import ALGORITHMS, Algorithm
from vllm_sparsed.decoding.paces import RULES, Selection
from vllm_sparsed.kernels.confidence_ranking.configs import Rule
from vllm_sparsed.kernels.counter_random import signed
from vllm_sparsed.logger import init_logger
from vllm_sparsed.planning.request_plan import RequestPlan, plan_request
from vllm_sparsed.planning.reuse import OpenBlock
from vllm_sparsed.worker.kept_passes import KeptPasses

logger = init_logger(__name__)

Tokens = npt.NDArray[np.int32]
Positions = npt.NDArray[np.intp]


class Attention(IntEnum):
    """How a request attends in a step."""

    DENSE = 0
    BUILDING = 1
    SPARSE = 2


@dataclass(slots=True, eq=False)  # compared by identity: one object is one run of a request
class RequestState:
    """Tokens, progress and patterns of one running request.

    Attributes:
        tokens: int32 [prompt + canvas]; undecided positions hold the mask token.
        given: bool [prompt + canvas]; positions that the client's prompt decided.
        seed: of the request's draws, a signed 64-bit number.
        sent: int32, the canvas tokens that the client had when this run started, a prefix: after a
            preemption these positions become what they were.
        sent_prompt: int32, with infilling the tokens of the prompt, as filled, that it had then.
        num_sent: tokens handed to the client by now, of the canvas, or with infilling of the whole
            sequence.
        block: index of the current semi-autoregressive block, the first that is not over.
        block_step: steps done within it, while it was the current one.
        block_masks: masked positions it started with.
        whole_block: the last block that began with all before it decided. A run that starts again
            there sees what this one saw; later blocks saw masks that the client has as tokens now.
        open_blocks: number of blocks whose masks may be decided, from the first on; one more than
            `block` but for requests that decide in several at once.
        candidates: positions that may be decided in this step, ascending: all masks up to the end
            of the last open block. A mask token inside the prompt is decided with the first block,
            and what earlier blocks left over stays a candidate.
        selections: how they are decided: those up to the end of the current block, then those of
            each further open block.
        num_passes, num_decided: forward passes done, and tokens decided in them.
        last_candidates, last_decided: candidates and decided tokens of the last step.
        decided_in: int32 [prompt + canvas], the pass, from 1, that decided each position; 0: none
            yet. None where nobody may watch.
        first_sparse_pass: the first with sparse attention, from 1; None: there was none yet.
        pattern_rows: of the pattern store, per sequence; empty until the patterns are built.
        kept: which rows its passes compute; None: every pass computes all, nothing is kept.
    """

    request_id: str
    plan: RequestPlan
    algorithm: Algorithm
    params: SamplingParams
    seed: int
    mask_token_id: int
    tokens: Tokens
    given: npt.NDArray[np.bool_]
    sent: Tokens
    sent_prompt: Tokens
    num_sent: int
    decided_in: npt.NDArray[np.int32] | None
    block: int = 0
    block_step: int = 0
    block_masks: int = 0
    whole_block: int = 0
    open_blocks: int = 0
    candidates: Positions = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    selections: tuple[Selection, ...] = ()
    num_passes: int = 0
    num_decided: int = 0
    first_sparse_pass: int | None = None
    last_candidates: int = 0
    last_decided: int = 0
    pattern_rows: list[list[int]] = field(default_factory=list)
    kept: KeptPasses | None = None
    _paced_attention: Attention = Attention.DENSE
    _attention_settled: bool = False
    _resume_block: int = 0
    _first_steps: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))

    @classmethod
    def from_request(
        cls, data: NewRequestData, settings: EngineSettings, last_resume: int | None = None
    ) -> "RequestState":
        """Start a request, or start it again after a preemption.

        What the client has by then is decided. The blocks that this fills are not run again, but
        for what the rest depends on: the patterns, masks inside the prompt, and with several open
        blocks what was decided in the others. Steps that are run again take the same decisions.

        Args:
            data: from the scheduler; its prefill tokens are the prompt and what the client has.
            settings: of the engine.
            last_resume: the last block that may be the first one to be run again, `whole_block` of
                the run that was preempted; None: any.
        """
        assert data.prompt_token_ids is not None and data.sampling_params is not None
        params = data.sampling_params
        assert params.seed is not None, "the scheduler seeds every request"
        plan = plan_request(data.prompt_token_ids, params, settings)
        tokens = np.full(plan.seq_len, settings.mask_token_id, dtype=np.int32)
        tokens[: plan.prompt_len] = data.prompt_token_ids
        steps = [block.steps for block in plan.blocks]
        outputs = (data.prefill_token_ids or [])[plan.prompt_len :]
        sent = np.array(outputs[plan.prompt_len - plan.first_output :], dtype=np.int32)
        state = cls(
            request_id=data.req_id,
            plan=plan,
            algorithm=ALGORITHMS[plan.parameters.alg],
            params=params,
            # The children of n > 1 have consecutive seeds, which may leave int64's range.
            seed=signed(params.seed),
            mask_token_id=settings.mask_token_id,
            tokens=tokens,
            given=tokens != settings.mask_token_id,
            sent=sent,
            sent_prompt=np.array(outputs[: plan.prompt_len - plan.first_output], dtype=np.int32),
            num_sent=len(outputs),
            _first_steps=np.cumsum([0, *steps]),
            decided_in=np.zeros(plan.seq_len, np.int32) if plan.parameters.show_canvas else None,
            kept=KeptPasses.of_request(data, plan),
        )
        ends = np.array([block.end for block in plan.blocks])
        masks_in_prompt = not state.given[: plan.prompt_len].all()
        if not masks_in_prompt and plan.parameters.block_add is None:
            resumed = int(ends.searchsorted(sent.size, side="right"))
            last = len(plan.blocks) - 1 if last_resume is None else last_resume
            state._resume_block = min(resumed, last)
        state._skip_to(state._first_block())
        state._plan_step()
        return state

    @property
    def step(self) -> int:
        """Steps before this one; with a pace those that the earlier blocks might have taken count,
        so that it is known wherever a request starts again."""
        return int(self._first_steps[self.block]) + self.block_step

    @property
    def finished(self) -> bool:
        return self.block == len(self.plan.blocks)

    @property
    def window(self) -> tuple[int, int] | None:
        """Rows [start, end) of each sequence that this step computes; None: all."""
        return None if self.kept is None else self.kept.window

    @property
    def rows(self) -> tuple[int, int]:
        """Rows [start, end) of each sequence that this step computes."""
        return self.window or (0, self.plan.seq_len)

    def next_tokens(self, max_batch_tokens: int) -> int:
        """Tokens that this step takes of the budget; 0: as many as any step, see `StepReport`."""
        if self.kept is None:
            return 0
        start, end = self.rows
        both = self.plan.num_sequences * (end - start)
        # Where its two sequences do not fit together they take turns.
        return both if both <= max_batch_tokens else end - start

    @property
    def judged(self) -> Positions:
        """The candidates that this step judges, those of its selections."""
        if self.kept is not None and self.kept.first_alone:
            return self.candidates[:1]
        return self.candidates

    def takes_pass(self) -> bool:
        """Whether this step computes anything: one that decides nothing and builds no pattern
        changes nothing."""
        if self.decides():
            return True
        # What is kept is refreshed for a pattern in the step alone in which all others build.
        return self.builds_patterns() and (self.kept is None or self.step == self.plan.pattern_step)

    def decides(self) -> bool:
        """Whether this step may decide a candidate."""
        return self.candidates.size > 0 and any(
            selection.quota > 0 or selection.rule != Rule.COUNT for selection in self.selections
        )

    def unmask_probability(self) -> float:
        """The probability with which `origin` decides each candidate in this step."""
        if self.finished or (self.kept is not None and self.kept.first_alone):
            return 1.0
        return self.algorithm.unmask_probability(
            self.block_step, self.plan.blocks[self.block].steps, self.plan.parameters.eps
        )

    @property
    def attention(self) -> Attention:
        """How the sequences attend in this step.

        Where keys and values are kept, the first refresh builds the patterns that begins at or
        after the step that else would.
        """
        attention = self._attention_if_all_rows
        if self.kept is None or attention == Attention.DENSE:
            return attention
        if self.kept.progress.has_patterns:
            return Attention.SPARSE
        return Attention.BUILDING if self.kept.window is None else Attention.DENSE

    @property
    def _attention_if_all_rows(self) -> Attention:
        """How they would attend if every step computed all rows."""
        pattern_step = self.plan.pattern_step
        if pattern_step < 0:
            return self._paced_attention
        step = self.step
        if step < pattern_step:
            return Attention.DENSE
        return Attention.BUILDING if step == pattern_step else Attention.SPARSE

    def builds_patterns(self) -> bool:
        return self.attention == Attention.BUILDING

    def phase(self, sequence: int) -> SequencePhase:
        """How sequence 0 (conditional) or 1 (unconditional) attends in this step."""
        plan, attention = self.plan, self.attention
        phase = SequencePhase(canvas_len=plan.canvas_len)
        if attention != Attention.DENSE:
            phase = SequencePhase(
                canvas_len=plan.canvas_len,
                block_size=plan.block_size,
                select=plan.select,
                builds=attention == Attention.BUILDING,
                pattern_rows=self.pattern_rows[sequence],
            )
        if self.kept is None:
            return phase
        window = None if self.window is None else (self.window[0], plan.seq_len)
        return replace(phase, pages=self.kept.pages[sequence], window=window)

    def attention_order(self) -> tuple[int, int]:
        """`SequencePhase.order` of the sequences in this step."""
        attention = self.attention
        block_size = self.plan.block_size if attention == Attention.SPARSE else 0
        return (int(attention) if self.window is None else WINDOW_ORDER, block_size)

    def sequence_tokens(self, sequence: int) -> Tokens:
        """The tokens of sequence 0, or of 1, which sees masks in place of what the client gave.

        As in LLaDA's reference, what was filled in for masks inside the prompt stays visible.
        """
        if sequence == 0:
            return self.tokens
        return np.where(self.given, np.int32(self.mask_token_id), self.tokens)

    def commit(self, tokens: npt.NDArray[np.int64] | None) -> None:
        """Write the step's decisions and go on to the next step.

        Args:
            tokens: int64, what each of `judged` is decided to be, or a negative number where it is
                not; None: the step took no pass.
        """
        attention = self.attention
        self.last_candidates, self.last_decided = 0, 0
        if tokens is not None:
            # A position that is decided to be the mask token stays one.
            decided = (tokens >= 0) & (tokens != self.mask_token_id)
            self._write(self.judged[decided], tokens[decided])
            self.num_passes += 1
            if self.decided_in is not None:
                self.decided_in[self.judged[decided]] = self.num_passes
            if attention == Attention.SPARSE and self.first_sparse_pass is None:
                self.first_sparse_pass = self.num_passes
            self.last_candidates, self.last_decided = self.judged.size, int(decided.sum())
            self.num_decided += self.last_decided
            if self.kept is not None:
                self.kept.advance(self.last_decided, attention == Attention.BUILDING)
        self.block_step += 1
        self._drop_decided()
        while not self.finished and self._block_is_over():
            self._start_block(self.block + 1)
        self._settle_attention(attention)
        if self.block < self._resume_block and self._is_settled(attention):
            self._skip_to(self._resume_block)
        self._plan_step()

    def log_passes(self) -> None:
        """Say what the request took, once it is over."""
        logger.debug(
            "Request %s took %d passes and decided %.2f tokens in each",
            self.request_id,
            self.num_passes,
            self.num_decided / max(1, self.num_passes),
        )

    def take_output(self) -> list[int]:
        """Tokens that became final since the last call: the client may have them.

        A token never changes once it is decided, and a mask may still become one until the request
        is over; so the final prefix ends before the first mask.
        """
        plan, first = self.plan, self.plan.first_output
        if self.finished:
            end = plan.seq_len
        else:
            end = plan.prompt_len + plan.blocks[self.open_blocks - 1].end
            # Candidates before the first output come first and hold nothing back.
            held = int(self.candidates.searchsorted(first))
            if held < self.candidates.size:
                end = int(self.candidates[held])
        start = first + self.num_sent
        if end <= start:
            return []
        output: list[int] = self.tokens[start:end].tolist()
        self.num_sent = end - first
        return output

    def _first_block(self) -> int:
        """Where a run starts: what lies before is decided, and nothing later depends on how."""
        plan = self.plan
        if self.kept is not None or (plan.parameters.pace is not None and plan.num_pattern_rows):
            return 0
        if plan.pattern_step < 0:
            return self._resume_block
        building = int(np.searchsorted(self._first_steps, plan.pattern_step, side="right")) - 1
        return min(building, self._resume_block)

    def _is_settled(self, attention: Attention) -> bool:
        """Whether no later step needs to know how earlier blocks were decided."""
        if self.kept is not None:
            return False  # what is stored of them comes from their own passes
        if self.plan.parameters.pace is not None and self.plan.num_pattern_rows:
            return self._attention_settled and self._paced_attention != Attention.BUILDING
        return self.plan.pattern_step < 0 or attention >= Attention.BUILDING

    def _settle_attention(self, attention: Attention) -> None:
        """With a pace: whether the next step builds the patterns, given how the last one attended.

        The first step that begins with the share `skip` of the canvas decided does, if sparse
        attention is asked for or predicted to pay in what is left (`Prediction.sparse_pays`).
        """
        plan = self.plan
        if plan.parameters.pace is None or not plan.num_pattern_rows or self.finished:
            return
        if attention == Attention.BUILDING:
            self._paced_attention = Attention.SPARSE
        if self._attention_settled:
            return
        left = int((self.tokens[plan.prompt_len :] == self.mask_token_id).sum())
        decided = plan.canvas_len - left
        if decided / plan.canvas_len < plan.parameters.sparsed_skip:
            return
        self._attention_settled = True
        most = plan.num_steps - self.step
        expected = min(most, math.ceil(left * self.num_passes / decided)) if decided else most
        if self.kept is not None:
            # Window passes gain too, but little beside a pass over all rows.
            longest = max(block.end - block.start for block in plan.blocks)
            expected = min(expected, self.kept.policy.expected_refreshes(left, longest))
        # The step that builds is a dense one.
        sparse = most > 1 and (
            plan.prediction is None or plan.prediction.sparse_pays(max(0, expected - 1))
        )
        logger.debug(
            "Request %s attends %s: %d of %d tokens decided in %d passes",
            self.request_id,
            "sparsely from now on" if sparse else "densely to its end",
            decided,
            plan.canvas_len,
            self.num_passes,
        )
        if sparse:
            self._paced_attention = Attention.BUILDING

    def _skip_to(self, index: int) -> None:
        """Go on to a block without those before it: what was sent of them is filled in.

        Nothing is filled in of blocks that are run again: a mask that one of them left over was
        decided later, and the steps in between saw a mask there.
        """
        self._write_sent(self.plan.blocks[index].start)
        self._start_block(index)

    def _start_block(self, index: int) -> None:
        """Go on to a block."""
        plan = self.plan
        self.block, self.block_step = index, 0
        if self.finished:
            self.candidates = self.candidates[:0]
            return
        if index >= self.open_blocks:
            self.open_blocks = index + 1
            masked = self.tokens[: plan.prompt_len + plan.blocks[index].end] == self.mask_token_id
            self.candidates = masked.nonzero()[0]
        if self._bound(index) == 0:
            self.whole_block = index
        self.block_masks = self._masks(index)

    def _block_is_over(self) -> bool:
        if self.block_step >= self.plan.blocks[self.block].steps:
            return True
        return self.plan.parameters.pace is not None and self._masks(self.block) == 0

    def _bound(self, index: int) -> int:
        """Where the candidates of a block begin; those of the first include the prompt's."""
        if index == 0:
            return 0
        start = self.plan.prompt_len + self.plan.blocks[index].start
        return int(self.candidates.searchsorted(start))

    def _masks(self, index: int) -> int:
        """Masks of an open block, those of the prompt counting as the first one's."""
        end = self.plan.prompt_len + self.plan.blocks[index].end
        return int(self.candidates.searchsorted(end)) - self._bound(index)

    def _decided_share(self, index: int) -> float:
        block = self.plan.blocks[index]
        total = block.end - block.start
        if index == 0:
            total += int((~self.given[: self.plan.prompt_len]).sum())
        return (total - self._masks(index)) / total

    def _plan_step(self) -> None:
        """Choose what the next step decides and which rows it computes."""
        self.selections = self._select()
        if self.kept is None or self.finished:
            return
        start = self.plan.prompt_len + self.plan.blocks[self.block].start
        end = self.plan.prompt_len + self.plan.blocks[self.open_blocks - 1].end
        first = int(self.candidates[0]) if self.candidates.size else start
        self.kept.plan(OpenBlock(start, end, first))
        if not self.kept.policy.begins_alone or not self.candidates.size:
            return
        if self.block_step == self.plan.blocks[self.block].steps - 1:
            # Nothing is put off any more, also what a first position alone has put off.
            self.kept.first_alone = False
            if self.plan.parameters.pace is None:
                self.selections = (Selection(self.candidates.size, self.candidates.size),)
        elif self.kept.first_alone:
            self.selections = (Selection(1, 1),)

    def _select(self) -> tuple[Selection, ...]:
        """How the next step decides its candidates; opens blocks where it may."""
        if self.finished:
            return ()
        plan, parameters = self.plan, self.plan.parameters
        block = plan.blocks[self.block]
        if parameters.pace is None:
            quota = self.algorithm.num_to_unmask(
                self.block_masks,
                self.candidates.size,
                self.block_step,
                block.steps,
                parameters.eps,
            )
            return (Selection(self.candidates.size, quota),)
        if parameters.block_add is not None:
            while (
                self.open_blocks < len(plan.blocks)
                and self._decided_share(self.open_blocks - 1) >= parameters.block_add
            ):
                opened = plan.blocks[self.open_blocks]
                start = plan.prompt_len + opened.start
                masked = self.tokens[start : plan.prompt_len + opened.end] == self.mask_token_id
                self.candidates = np.concatenate((self.candidates, masked.nonzero()[0] + start))
                self.open_blocks += 1
        name, bound = parameters.pace
        rule = RULES[name]
        size = int(self.candidates.searchsorted(plan.prompt_len + block.end))
        if self.block_step == block.steps - 1:
            # The last step that the block may take.
            selections = [Selection(size, size)]
        else:
            selections = [Selection(size, 1, rule, bound)]
        full = BLOCK_FULL if parameters.block_full is None else parameters.block_full
        for index in range(self.block + 1, self.open_blocks):
            # Once its predecessor is full a block advances in every step, sure or not.
            quota = int(self._decided_share(index - 1) >= full)
            selections.append(Selection(self._masks(index), quota, rule, bound))
        return tuple(selections)

    def _drop_decided(self) -> None:
        self.candidates = self.candidates[self.tokens[self.candidates] == self.mask_token_id]

    def _write(self, positions: Positions, tokens: npt.NDArray[np.int64]) -> None:
        """Decide positions; those that the client has become what they were."""
        self.tokens[positions] = tokens
        for start, sent in ((0, self.sent_prompt), (self.plan.prompt_len, self.sent)):
            if sent.size:
                places = positions[positions >= start] - start
                places = places[places < sent.size]
                self.tokens[start + places] = sent[places]

    def _write_sent(self, end: int) -> None:
        """Fill what the client has of the canvas before `end` into what is still masked."""
        if self.sent.size:
            known = self.sent[:end]
            canvas = self.tokens[self.plan.prompt_len :][: known.size]
            np.copyto(canvas, known, where=canvas == self.mask_token_id)
            self._drop_decided()
