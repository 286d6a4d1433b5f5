"""One decoding step of a whole batch: tokens, confidences, and which of them are committed."""

import math
import os
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.decoding.algorithms import Order
from vllm_sparsed.decoding.arrangement import Arrangement, CandidateFields, arrange, upload
from vllm_sparsed.decoding.candidates import Candidates
from vllm_sparsed.decoding.rng import Stream, gumbel, uniform
from vllm_sparsed.decoding.shaping import draw, guide, keep_top_k, keep_top_p
from vllm_sparsed.decoding.treatments import Treatment
from vllm_sparsed.kernels.confidence_ranking import Groups, decide
from vllm_sparsed.kernels.logit_cutoff import logit_cutoff
from vllm_sparsed.kernels.token_confidence import Draw, token_confidence
from vllm_sparsed.kernels.token_confidence.torch_path import statistic_torch

__all__ = ["BatchDecoder", "Candidates"]

# Elements of a [rows, vocab] matrix that drawing or sorting works on at once: some of its
# intermediate results have 8 bytes an element.
_WIDE_ELEMENTS: Final = 1 << 23


class BatchDecoder:
    """Decides which candidates of a batch become tokens in a step.

    Nothing in it waits for the device: what decides the control flow is known on the host.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        mask_token_id: int,
        eos_token_id: int | None,
        eot_token_id: int | None,
        device: torch.device | str,
        max_chunk_rows: int,
    ) -> None:
        """Prepare for one model.

        Args:
            vocab_size: columns of the logits.
            mask_token_id: token of an undecided position; a candidate may get it like any other,
                and stays masked then; paces pass it over.
            eos_token_id, eot_token_id: end of sequence and of turn, where the model has them.
            device: where hidden states and logits are.
            max_chunk_rows: rows whose logits exist at the same time.

        Raises:
            ValueError: a token outside the vocabulary, or no rows.
        """
        special = (mask_token_id, eos_token_id, eot_token_id)
        if any(token is not None and not 0 <= token < vocab_size for token in special):
            raise ValueError(f"special tokens {special} with a vocabulary of {vocab_size}")
        if max_chunk_rows < 1:
            raise ValueError(f"max_chunk_rows is {max_chunk_rows}")
        self.vocab_size = vocab_size
        self.mask_token_id = mask_token_id
        self.device = torch.device(device)
        self.max_chunk_rows = max_chunk_rows
        self._wide_rows = max(1, _WIDE_ELEMENTS // vocab_size)
        eos = [] if eos_token_id is None else [eos_token_id]
        ends = eos if eot_token_id is None else [*eos, eot_token_id]
        self._eos = torch.tensor(eos, dtype=torch.int64, device=self.device)
        self._ends = torch.tensor(ends, dtype=torch.int64, device=self.device)

    @torch.no_grad()
    def decode(
        self,
        candidates: Candidates,
        hidden: Tensor,
        unconditional_hidden: Tensor | None,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the token that each candidate is decided to be in this step.

        With the LLaDA algorithms, with `origin` and with every pace, temperature, top_p and top_k
        shape the draw of the token alone (top_p and top_k are not in LLaDA's reference); with
        Dream's other algorithms they shape the confidence too.

        Args:
            candidates: R of them.
            hidden: [R, hidden_size], the hidden state that decides each candidate.
            unconditional_hidden: [Rg, hidden_size], the second sequence's hidden states of the
                candidates whose request has guidance, in their order; None where none has.
            compute_logits: maps [n, hidden_size] to logits [n, vocab]; it is called with at most
                `max_chunk_rows` rows.

        Returns:
            int64 [R] on the device: a token, UNDECIDED, or NOT_FINITE where the logits of the
            candidate were not finite.

        Raises:
            ValueError: the shapes do not fit the candidates.
        """
        num_candidates = candidates.request.size
        num_guided = int((candidates.cfg_scale > 0)[candidates.request].sum())
        num_unconditional = 0 if unconditional_hidden is None else unconditional_hidden.shape[0]
        if hidden.shape[0] != num_candidates or num_unconditional != num_guided:
            raise ValueError(
                f"{num_candidates} candidates, {num_guided} of them guided, but {hidden.shape[0]} "
                f"and {num_unconditional} hidden states"
            )
        if num_candidates == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        arrangement = arrange(candidates, self.vocab_size)
        fields = upload(arrangement.fields, self.device)
        if fields.order is not None:
            hidden = hidden[fields.order]
            if unconditional_hidden is not None:
                unconditional_hidden = unconditional_hidden[fields.unconditional]
        tokens, confidence = self._propose_all(
            arrangement, fields, hidden, unconditional_hidden, compute_logits
        )
        return self._decide(fields, tokens, confidence)

    def _propose_all(
        self,
        arrangement: Arrangement,
        fields: CandidateFields[Tensor],
        hidden: Tensor,
        unconditional_hidden: Tensor | None,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return tokens, int64 [R], and confidences, float [R], in decoding order."""
        tokens, confidences = [], []
        for start in range(0, arrangement.num_candidates, self.max_chunk_rows):
            end = min(start + self.max_chunk_rows, arrangement.num_candidates)
            chunk = compute_logits(hidden[start:end])
            for segment in arrangement.segments:
                low, high = max(segment.start, start), min(segment.end, end)
                if low >= high:
                    continue
                treatment = segment.treatment
                logits = chunk[low - start : high - start]
                if treatment.guided:
                    # Guided ones come first, so both sequences' hidden states share the index.
                    assert unconditional_hidden is not None and fields.cfg_scale is not None
                    unconditional = compute_logits(unconditional_hidden[low:high])
                    logits = guide(logits, unconditional, fields.cfg_scale[low:high])
                if treatment.without_eos:
                    logits = logits.index_fill(1, self._eos, -math.inf)
                wide = (treatment.cuts or treatment.sampled) and not _through_kernels(logits)
                for part in logits.split(self._wide_rows if wide else high - low):
                    own = fields.part(low, low + len(part))
                    low += len(part)
                    proposed, confidence = _propose(treatment, part, own, arrangement.largest_top_k)
                    tokens.append(proposed)
                    confidences.append(confidence)
        if len(tokens) == 1:
            return tokens[0], confidences[0]
        return torch.cat(tokens), torch.cat(confidences)

    def _decide(
        self, fields: CandidateFields[Tensor], tokens: Tensor, confidence: Tensor
    ) -> Tensor:
        """Return what each candidate is decided to be, int64 [R], in the order they were given.

        Among equals the lowest position is first, because the candidates are so ordered.
        """
        if fields.alg_temp is not None:
            # The k best of confidence / alg_temp + Gumbel noise are a draw of k without
            # replacement from the softmax; times alg_temp, a temperature of 0 adds nothing.
            confidence = confidence + fields.alg_temp * gumbel(_noise(fields, Stream.ORDER_NOISE))
        if fields.last_if_end is not None:
            is_end = (tokens[:, None] == self._ends).any(dim=1) & ~confidence.isnan()
            confidence = confidence.masked_fill(fields.last_if_end & is_end, -math.inf)
        return decide(
            tokens,
            confidence,
            Groups(
                group=fields.group,
                first=fields.first,
                quota=fields.quota,
                rule=fields.rule,
                bound=fields.bound,
            ),
            self.mask_token_id,
            uniforms=None if fields.probability is None else _noise(fields, Stream.ORIGIN),
            probability=fields.probability,
            order=fields.order,
        )


def _propose(
    treatment: Treatment, logits: Tensor, fields: CandidateFields[Tensor], largest_top_k: int
) -> tuple[Tensor, Tensor]:
    """Return tokens, int64 [rows], and confidences, float [rows], for logits [rows, vocab]."""
    if _through_kernels(logits):
        tokens, statistic = _propose_by_kernels(treatment, logits, fields)
    else:
        tokens, statistic = _propose_by_torch(treatment, logits, fields, largest_top_k)
    if treatment.ranked:
        return tokens, statistic
    if treatment.ranking.order == Order.RANDOM:
        confidence = _noise(fields, Stream.RANDOM_ORDER)
    else:
        confidence = torch.zeros_like(statistic)
    return tokens, confidence.masked_fill(statistic.isnan(), math.nan)


def _propose_by_torch(
    treatment: Treatment, logits: Tensor, fields: CandidateFields[Tensor], largest_top_k: int
) -> tuple[Tensor, Tensor]:
    """Tokens and the statistic, one operation after the other."""
    shaped = logits
    if treatment.sampled:
        assert fields.temperature is not None
        shaped = logits.float() / fields.temperature.float()[:, None]
    if treatment.top_p:
        assert fields.top_p is not None
        shaped = keep_top_p(shaped.float(), fields.top_p)
    if treatment.top_k:
        assert fields.top_k is not None
        shaped = keep_top_k(shaped.float(), fields.top_k, largest_top_k)

    if treatment.sampled:
        assert fields.temperature is not None
        drawn_from = logits
        if treatment.cuts:
            drawn_from = logits.masked_fill(shaped == -math.inf, -math.inf)
        uniforms = _noise(fields, Stream.CANDIDATE, logits.shape[1])
        tokens = draw(drawn_from, fields.temperature, uniforms)
    else:
        tokens = logits.argmax(dim=1)
    behind = shaped if treatment.ranking.shaped else logits
    probabilities = behind.softmax(dim=1, dtype=torch.float32)
    return tokens, statistic_torch(probabilities, tokens, treatment.ranking.statistic)


def _propose_by_kernels(
    treatment: Treatment, logits: Tensor, fields: CandidateFields[Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_propose_by_torch`, without a matrix as large as the logits."""
    draw = None
    if treatment.sampled:
        assert fields.temperature is not None
        draw = Draw(
            temperature=fields.temperature,
            seed=fields.seed,
            step=fields.step,
            position=fields.position,
            stream=int(Stream.CANDIDATE),
        )
    cutoff = None
    if treatment.cuts:
        cutoff = logit_cutoff(
            logits,
            temperature=fields.temperature if treatment.sampled else None,
            top_p=fields.top_p if treatment.top_p else None,
            top_k=fields.top_k if treatment.top_k else None,
        )
    ranking = treatment.ranking
    return token_confidence(logits, ranking.statistic, draw, cutoff=cutoff, shaped=ranking.shaped)


def _through_kernels(logits: Tensor) -> bool:
    """Whether the kernels run here, which make no matrix as large as the logits."""
    return logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _noise(fields: CandidateFields[Tensor], stream: Stream, columns: int | None = None) -> Tensor:
    return uniform(fields.seed, fields.step, fields.position, stream, columns)
