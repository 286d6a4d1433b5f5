"""One decoding step of a whole batch: candidates, confidences, and which of them are committed."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.decoding.decode_rows import (
    DecodePlan,
    DecodeRows,
    Treatment,
    arrange,
    upload,
)
from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.rng import Stream, gumbel, uniform
from vllm_sparsed.decoding.shaping import draw, guide, keep_top_k, keep_top_p
from vllm_sparsed.kernels.confidence_ranking import RankedRows, decide_rows
from vllm_sparsed.kernels.token_confidence import Draw, token_confidence

__all__ = ["BatchDecoder", "DecodeRows"]

# Elements of a [rows, vocab] matrix that drawing or sorting works on at once: some of its
# intermediate results have 8 bytes an element.
_WIDE_ELEMENTS: Final = 1 << 23


class BatchDecoder:
    """Decides which masked rows of a batch become tokens in a step.

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
            mask_token_id: token of an undecided position; it may be a candidate like any other,
                and a position that gets it stays masked.
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
        rows: DecodeRows,
        hidden: Tensor,
        unconditional_hidden: Tensor | None,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the token that each row is committed to in this step, or -1.

        With the LLaDA algorithms and with `origin`, temperature, top_p and top_k shape the draw
        of the candidate alone (top_p and top_k are not in LLaDA's reference); with the others
        they shape the confidence too.

        Args:
            rows: the R rows.
            hidden: [R, hidden_size], the hidden state that decides each row.
            unconditional_hidden: [Rg, hidden_size], the second sequence's hidden states of the
                rows whose request has guidance, in row order; None where none has.
            compute_logits: maps [n, hidden_size] to logits [n, vocab]; it is called with at most
                `max_chunk_rows` rows.

        Returns:
            int64 [R] on the device.

        Raises:
            ValueError: the shapes do not fit the rows.
        """
        num_rows = rows.request.size
        num_guided = int((rows.cfg_scale > 0)[rows.request].sum())
        num_unconditional = 0 if unconditional_hidden is None else unconditional_hidden.shape[0]
        if hidden.shape[0] != num_rows or num_unconditional != num_guided:
            raise ValueError(
                f"{num_rows} rows, {num_guided} of them guided, but {hidden.shape[0]} and "
                f"{num_unconditional} hidden states"
            )
        if num_rows == 0:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        plan = arrange(rows, self.vocab_size)
        fields = upload(plan.arrays, self.device)
        order = fields.get("order")
        if order is not None:
            hidden = hidden[order]
            if unconditional_hidden is not None:
                unconditional_hidden = unconditional_hidden[fields["unconditional"]]

        candidates, confidence = self._propose_all(
            plan, fields, hidden, unconditional_hidden, compute_logits
        )
        return self._decide(fields, candidates, confidence)

    def _propose_all(
        self,
        plan: DecodePlan,
        fields: Mapping[str, Tensor],
        hidden: Tensor,
        unconditional_hidden: Tensor | None,
        compute_logits: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return candidates, int64 [R], and confidences, float [R], in decoding order."""
        candidates, confidences = [], []
        for start in range(0, plan.num_rows, self.max_chunk_rows):
            end = min(start + self.max_chunk_rows, plan.num_rows)
            chunk = compute_logits(hidden[start:end])
            for segment in plan.segments:
                low, high = max(segment.start, start), min(segment.end, end)
                if low >= high:
                    continue
                treatment = segment.treatment
                logits = chunk[low - start : high - start]
                if treatment.guided:
                    # Guided rows come first, so both sequences' hidden states share the index.
                    assert unconditional_hidden is not None
                    unconditional = compute_logits(unconditional_hidden[low:high])
                    logits = guide(logits, unconditional, fields["cfg_scale"][low:high])
                if treatment.without_eos:
                    logits = logits.index_fill(1, self._eos, -math.inf)
                wide = treatment.cuts or (treatment.sampled and not _one_pass(logits))
                for part in logits.split(self._wide_rows if wide else high - low):
                    part_fields = {name: field[low:][: len(part)] for name, field in fields.items()}
                    low += len(part)
                    proposed, confidence = _propose(
                        treatment, part, part_fields, plan.largest_top_k
                    )
                    candidates.append(proposed)
                    confidences.append(confidence)
        if len(candidates) == 1:
            return candidates[0], confidences[0]
        return torch.cat(candidates), torch.cat(confidences)

    def _decide(
        self, fields: Mapping[str, Tensor], candidates: Tensor, confidence: Tensor
    ) -> Tensor:
        """Return each row's token or -1, int64 [R]: a request's most confident rows are unmasked.

        Among equals the lowest position is first, because the rows are so ordered.
        """
        if "alg_temp" in fields:
            # The k best of confidence / alg_temp + Gumbel noise are a draw of k without
            # replacement from the softmax; times alg_temp, a temperature of 0 adds nothing.
            noise = gumbel(_noise(fields, Stream.ORDER_NOISE))
            confidence = confidence + fields["alg_temp"] * noise
        if "last_if_end" in fields:
            is_end = (candidates[:, None] == self._ends).any(dim=1)
            confidence = confidence.masked_fill(fields["last_if_end"] & is_end, -math.inf)
        probability = fields.get("unmask_probability")
        return decide_rows(
            candidates,
            confidence,
            RankedRows(
                request=fields["request"],
                first_row=fields["first_row"],
                num_to_unmask=fields["num_to_unmask"],
                order=fields.get("order"),
            ),
            uniforms=None if probability is None else _noise(fields, Stream.ORIGIN),
            probability=probability,
        )


def _propose(
    treatment: Treatment, logits: Tensor, fields: Mapping[str, Tensor], largest_top_k: int
) -> tuple[Tensor, Tensor]:
    """Return candidates, int64 [rows], and confidences, float [rows], for logits [rows, vocab]."""
    if _one_pass(logits) and not treatment.cuts:
        return _propose_in_one_pass(treatment, logits, fields)
    shaped = logits
    if treatment.sampled:
        shaped = logits.float() / fields["temperature"].float()[:, None]
    if treatment.top_p:
        shaped = keep_top_p(shaped.float(), fields["top_p"])
    if treatment.top_k:
        shaped = keep_top_k(shaped.float(), fields["top_k"], largest_top_k)

    if treatment.sampled:
        drawn_from = logits
        if treatment.top_p or treatment.top_k:
            drawn_from = logits.masked_fill(shaped == -math.inf, -math.inf)
        uniforms = _noise(fields, Stream.CANDIDATE, logits.shape[1])
        candidates = draw(drawn_from, fields["temperature"], uniforms)
    else:
        candidates = logits.argmax(dim=1)

    behind = shaped if treatment.decoder.shapes_confidence else logits
    proposal = Proposal(
        candidates,
        probabilities=lambda: behind.softmax(dim=1, dtype=torch.float32),
        noise=lambda: _noise(fields, Stream.RANDOM_ORDER),
    )
    return candidates, treatment.decoder.confidence(proposal)


def _one_pass(logits: Tensor) -> bool:
    """Whether the kernel that makes one pass over the logits runs here."""
    return logits.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def _propose_in_one_pass(
    treatment: Treatment, logits: Tensor, fields: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """As `_propose`, without top_p and top_k."""
    decoder = treatment.decoder
    draw = None
    if treatment.sampled:
        draw = Draw(
            temperature=fields["temperature"],
            seed=fields["seed"],
            step=fields["step"],
            position=fields["position"],
            stream=int(Stream.CANDIDATE),
            scales=decoder.shapes_confidence,
        )
    candidates, confidence = token_confidence(logits, decoder.statistic, draw)
    if confidence is None:
        proposal = Proposal(
            candidates,
            probabilities=lambda: logits.softmax(dim=1, dtype=torch.float32),
            noise=lambda: _noise(fields, Stream.RANDOM_ORDER),
        )
        confidence = decoder.confidence(proposal)
    return candidates, confidence


def _noise(fields: Mapping[str, Tensor], stream: Stream, columns: int | None = None) -> Tensor:
    return uniform(fields["seed"], fields["step"], fields["position"], stream, columns)
