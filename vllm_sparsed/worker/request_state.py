"""What the model runner remembers of one request between denoising steps."""

from dataclasses import dataclass, field

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
        num_sent: tokens already handed to the client, of the canvas, or with infilling of the
            whole sequence.
        pattern_rows: of the pattern store, per sequence; empty until the patterns are built.
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
        )
        state._start_block(0)
        return state

    def num_to_unmask(self) -> int:
        """How many of the candidates this step decides."""
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

    def builds_patterns(self) -> bool:
        return self.plan.pattern_step == self.step

    def phase(self, sequence: int) -> SequencePhase:
        """How sequence 0 (conditional) or 1 (unconditional) attends in this step."""
        plan = self.plan
        if plan.pattern_step < 0 or self.step < plan.pattern_step:
            return SequencePhase(canvas_len=plan.canvas_len)
        return SequencePhase(
            canvas_len=plan.canvas_len,
            block_size=plan.block_size,
            select=plan.select,
            builds=self.builds_patterns(),
            pattern_rows=self.pattern_rows[sequence],
        )

    def sequence_tokens(self, sequence: int) -> Tokens:
        """The tokens of sequence 0, or of 1, which sees masks in place of what the client gave.

        As in LLaDA's reference, what was filled in for masks inside the prompt stays visible.
        """
        if sequence == 0:
            return self.tokens
        return np.where(self.given, np.int32(self.mask_token_id), self.tokens)

    def attention_order(self) -> tuple[int, int]:
        """`SequencePhase.order` of the sequences in this step."""
        pattern_step = self.plan.pattern_step
        if pattern_step < 0 or self.step < pattern_step:
            return (0, 0)
        if self.step == pattern_step:
            return (1, 0)
        return (2, self.plan.block_size)

    def commit(self, tokens: npt.NDArray[np.int64] | None) -> None:
        """Write the step's decisions and go on to the next step.

        Args:
            tokens: int64, what each candidate is decided to be, or -1; None: the step decided
            nothing.
        """
        if tokens is not None:
            decided = tokens >= 0
            self.tokens[self.candidates[decided]] = tokens[decided]
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

    def take_output(self) -> list[int]:
        """Tokens that became final since the last call: the client may have them.

        A token never changes once it is decided, and a mask of a finished block stays one; so the
        final prefix ends before the first mask of the current or a later block.
        """
        plan, first = self.plan, self.plan.first_output
        if self.block == len(plan.blocks):
            end = plan.seq_len
        else:
            end = plan.prompt_len + plan.blocks[self.block].end
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

    def _start_block(self, index: int) -> None:
        block, prompt_len = self.plan.blocks[index], self.plan.prompt_len
        start = prompt_len + block.start if index else 0
        masked = self.tokens[start : prompt_len + block.end] == self.mask_token_id
        self.candidates = masked.nonzero()[0] + start
        self.block, self.block_step, self.block_masks = index, 0, self.candidates.size
