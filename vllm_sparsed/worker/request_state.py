"""What the model runner remembers of one request between denoising steps."""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_sparsed.attention.metadata import SequencePhase
from vllm_sparsed.config.settings import EngineSettings
from vllm_sparsed.decoding import DECODERS
from vllm_sparsed.decoding.protocol import Decoder
from vllm_sparsed.decoding.rng import signed
from vllm_sparsed.planning.request_plan import RequestPlan, plan_request
from vllm_sparsed.planning.reuse import OpenBlock, ReusePolicy, ReuseProgress, patterns_due

Tokens = npt.NDArray[np.int32]


@dataclass(slots=True, eq=False)  # compared by identity: one object is one run of a request
class RequestState:
    """Tokens, progress and patterns of one running request.

    Attributes:
        tokens: int32 [prompt + canvas]; undecided positions hold the mask token.
        given: bool [prompt + canvas]; positions that the client's prompt decided.
        seed: of the request's draws, a signed 64-bit number.
        step: denoising steps done, over all blocks.
        block: index of the current semi-autoregressive block.
        block_step: steps done within it.
        block_masks: masked positions it started with.
        candidates: positions that may be unmasked in this step, ascending: the masked ones of the
            current block. A mask token inside the prompt is decided with the first block.
        num_sent: canvas tokens already handed to the client.
        pattern_rows: of the pattern store, per sequence; empty until the patterns are built.
        pages: of the store of keys and values, per sequence; empty where nothing is kept: then
            every pass computes all rows.
        progress: passes so far, where pages are kept.
        window: rows [start, end) that the coming pass computes; None: all.
    """

    request_id: str
    plan: RequestPlan
    decoder: Decoder
    params: SamplingParams
    seed: int
    mask_token_id: int
    tokens: Tokens
    given: npt.NDArray[np.bool_]
    num_sent: int
    step: int = 0
    block: int = 0
    block_step: int = 0
    block_masks: int = 0
    candidates: npt.NDArray[np.intp] = field(default_factory=lambda: np.empty(0, dtype=np.intp))
    pattern_rows: list[list[int]] = field(default_factory=list)
    pages: tuple[list[int], ...] = ()
    progress: ReuseProgress = field(default_factory=ReuseProgress)
    window: tuple[int, int] | None = None

    @classmethod
    def from_request(cls, data: NewRequestData, settings: EngineSettings) -> "RequestState":
        """Start a request, or start it again after a preemption: then what was sent stays sent."""
        assert data.prompt_token_ids is not None and data.sampling_params is not None
        params = data.sampling_params
        assert params.seed is not None, "the scheduler seeds every request"
        plan = plan_request(data.prompt_token_ids, params, settings)
        tokens = np.full(plan.seq_len, settings.mask_token_id, dtype=np.int32)
        tokens[: plan.prompt_len] = data.prompt_token_ids
        state = cls(
            request_id=data.req_id,
            plan=plan,
            decoder=DECODERS[plan.parameters.alg],
            params=params,
            # The children of n > 1 have consecutive seeds, which may leave int64's range.
            seed=signed(params.seed),
            mask_token_id=settings.mask_token_id,
            tokens=tokens,
            given=tokens != settings.mask_token_id,
            num_sent=len(data.prefill_token_ids or data.prompt_token_ids) - plan.prompt_len,
            pages=_pages_of_sequences(data, plan),
        )
        state._start_block(0)
        return state

    @property
    def reuse(self) -> ReusePolicy | None:
        """Of a request whose keys and values are kept."""
        return self.plan.reuse if self.pages else None

    @property
    def rows(self) -> tuple[int, int]:
        """[start, end) of each sequence that the coming pass computes."""
        return self.window or (0, self.plan.seq_len)

    @property
    def num_rows(self) -> int:
        start, end = self.rows
        return end - start

    def num_to_unmask(self) -> int:
        """How many of the candidates this step decides."""
        if self._decides_first_alone():
            return 1
        return self.decoder.num_to_unmask(
            self.block_masks,
            self.candidates.size,
            self.block_step,
            self.plan.blocks[self.block].steps,
            self.plan.parameters.eps,
        )

    def unmask_probability(self) -> float:
        """The probability with which `origin` decides each candidate in this step."""
        return self.decoder.unmask_probability(
            self.block_step, self.plan.blocks[self.block].steps, self.plan.parameters.eps
        )

    def takes_pass(self) -> bool:
        """Whether this step computes anything: one that decides nothing and builds no pattern
        changes nothing. Where keys and values are kept, only in the step in which `none` builds."""
        if self.num_to_unmask() > 0:
            return True
        return self.builds_patterns() and self.step == self.plan.pattern_step

    def builds_patterns(self) -> bool:
        plan = self.plan
        if self.reuse is None:
            return plan.pattern_step == self.step
        if plan.pattern_step < 0 or self.window is not None or self.progress.has_patterns:
            return False
        return patterns_due(plan.pattern_step, self.step, self.progress.passes, 0, 0, None)

    def is_sparse(self) -> bool:
        """Whether this step attends by patterns that an earlier one has built."""
        if self.reuse is None:
            return 0 <= self.plan.pattern_step < self.step
        return self.progress.has_patterns

    def phase(self, sequence: int) -> SequencePhase:
        """How sequence 0 (conditional) or 1 (unconditional) attends in this step."""
        plan = self.plan
        phase = SequencePhase(canvas_len=plan.canvas_len)
        if self.builds_patterns() or self.is_sparse():
            phase = SequencePhase(
                canvas_len=plan.canvas_len,
                block_size=plan.block_size,
                select=plan.select,
                builds=self.builds_patterns(),
                pattern_rows=self.pattern_rows[sequence],
            )
        if self.reuse is None:
            return phase
        window = None if self.window is None else (self.window[0], plan.seq_len)
        return replace(phase, pages=self.pages[sequence], window=window)

    def sequence_tokens(self, sequence: int) -> Tokens:
        """The tokens of sequence 0, or of 1, which sees masks in place of what the client gave.

        As in LLaDA's reference, what was filled in for masks inside the prompt stays visible.
        """
        if sequence == 0:
            return self.tokens
        return np.where(self.given, np.int32(self.mask_token_id), self.tokens)

    def attention_order(self) -> tuple[int, int]:
        """`SequencePhase.order` of the sequences in this step."""
        if self.window is not None:
            return (3, self.plan.block_size if self.is_sparse() else 0)
        if self.is_sparse():
            return (2, self.plan.block_size)
        return (1, 0) if self.builds_patterns() else (0, 0)

    def commit(self, tokens: npt.NDArray[np.int64] | None) -> None:
        """Write the step's decisions and go on to the next step.

        Args:
            tokens: int64, what each of `pass_candidates` is decided to be, or -1; None: the step
                took no pass.
        """
        if tokens is not None:
            decided = tokens >= 0
            self.tokens[self.pass_candidates()[decided]] = tokens[decided]
            if self.reuse is not None:
                self.progress.has_patterns |= self.builds_patterns()
                self.progress.advance(
                    self._open_block().start, self.window is None, int(decided.sum())
                )
            # A position that is decided to be the mask token stays one.
            still_masked = self.tokens[self.candidates] == self.mask_token_id
            self.candidates = self.candidates[still_masked]
        self.step += 1
        self.block_step += 1
        if self.block_step == self.plan.blocks[self.block].steps:
            if self.block + 1 < len(self.plan.blocks):
                self._start_block(self.block + 1)
            else:
                self.block += 1
        self._plan_pass()

    def pass_candidates(self) -> npt.NDArray[np.intp]:
        """The candidates that this step judges."""
        return self.candidates[:1] if self._decides_first_alone() else self.candidates

    def _decides_first_alone(self) -> bool:
        reuse = self.reuse
        return (
            reuse is not None
            and self.candidates.size > 0
            and self.progress.first_alone(reuse, self._open_block())
        )

    def _open_block(self) -> OpenBlock:
        block, prompt_len = self.plan.blocks[self.block], self.plan.prompt_len
        start, end = prompt_len + block.start, prompt_len + block.end
        first = int(self.candidates[0]) if self.candidates.size else start
        return OpenBlock(start, end, first)

    def _plan_pass(self) -> None:
        """Choose the rows of the coming pass."""
        if self.reuse is not None and self.block < len(self.plan.blocks):
            self.window = self.progress.window(self.reuse, self._open_block(), self.plan.seq_len)

    def take_output(self) -> list[int]:
        """Canvas tokens that became final since the last call: the client may have them.

        A token never changes once it is decided, and a mask of a finished block stays one; so the
        final prefix ends before the first mask of the current or a later block.
        """
        prompt_len = self.plan.prompt_len
        if self.block == len(self.plan.blocks):
            end = self.plan.canvas_len
        else:
            end = self.plan.blocks[self.block].end
            # Candidates inside the prompt come first and hold nothing back.
            first = int(self.candidates.searchsorted(prompt_len))
            if first < self.candidates.size:
                end = int(self.candidates[first]) - prompt_len
        if end <= self.num_sent:
            return []
        output: list[int] = self.tokens[prompt_len + self.num_sent : prompt_len + end].tolist()
        self.num_sent = end
        return output

    def _start_block(self, index: int) -> None:
        block, prompt_len = self.plan.blocks[index], self.plan.prompt_len
        start = prompt_len + block.start if index else 0
        masked = self.tokens[start : prompt_len + block.end] == self.mask_token_id
        self.candidates = masked.nonzero()[0] + start
        self.block, self.block_step, self.block_masks = index, 0, self.candidates.size
        self._plan_pass()


def _pages_of_sequences(data: NewRequestData, plan: RequestPlan) -> tuple[list[int], ...]:
    """The request's pages, an equal part for each of its sequences, as the scheduler took them."""
    pages = data.block_ids[0] if data.block_ids else []
    if not pages:
        return ()
    each = len(pages) // plan.num_sequences
    return tuple(pages[i * each : (i + 1) * each] for i in range(plan.num_sequences))
