"""The generate loops of LLaDA and Dream, one sequence at a time, every step in the open."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Noise = Callable[[str, int, Tensor, int | None], Tensor]
"""(purpose, step, positions [rows], columns) -> float64 in (0, 1), [rows] or [rows, columns].

Purposes: `candidate`, `random_order`, `order_noise`, `origin`.
"""


class DenoisedSequence(Protocol):
    """Forward passes over one sequence, which may keep patterns between steps."""

    def logits(self, tokens: Tensor, step: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """What shapes the choice of tokens; the defaults change nothing.

    Attributes:
        confidence_end_tokens: candidates that come last (`confidence_eos_eot_inf`).
        forbidden_token: its logit becomes -inf (`logits_eos_inf`).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    alg_temp: float = 0.0
    cfg_scale: float = 0.0
    confidence_end_tokens: tuple[int, ...] = ()
    forbidden_token: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the loop.

    Attributes:
        index: step of the whole request.
        before: int64 [L], the tokens that the forward pass saw.
        positions: those that were unmasked, ascending.
        tokens: what they became.
        order_margin: confidence of the last position unmasked minus that of the first one left;
            with a pace the smallest change of a confidence, an entropy or a sum of entropies that
            would decide otherwise.
        token_margin: smallest distance from a token chosen to the runner-up, in logits (with the
            noise, where tokens are drawn).
    """

    index: int
    before: Tensor
    positions: tuple[int, ...]
    tokens: tuple[int, ...]
    order_margin: float
    token_margin: float


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate, and from what.

    Attributes:
        new_sequence: makes the conditional sequence and, called again, the unconditional one.
        prompt: int64 [prompt tokens].
        canvas_len: tokens to generate.
        mask_token_id: marks an undecided position.
        logit_shift: whether row p of the logits decides position p + 1.
        noise: random numbers; needed where something is drawn.
    """

    new_sequence: Callable[[], DenoisedSequence]
    prompt: Tensor
    canvas_len: int
    mask_token_id: int
    logit_shift: bool
    sampling: Sampling = Sampling()
    noise: Noise | None = None


def llada_blocks(
    canvas_len: int, block_length: int, steps: int, prompt_masks: int = 0
) -> list[tuple[int, int]]:
    """(end on the canvas, steps) of each block, left to right.

    What does not divide evenly goes to the first blocks; a block gets at least one step and at
    most one for each mask, those of the prompt counting as the first block's.
    """
    starts = list(range(0, canvas_len, block_length))
    blocks = []
    for index, start in enumerate(starts):
        end = min(start + block_length, canvas_len)
        share = steps // len(starts) + (index < steps % len(starts))
        masks = end - start + (0 if index else prompt_masks)
        blocks.append((end, max(1, min(share, masks))))
    return blocks


def generate_llada(
    request: Request,
    *,
    steps: int,
    block_length: int,
    alg: str = "low_confidence",
) -> list[Step]:
    """LLaDA's semi-autoregressive loop.

    What is still masked in earlier blocks stays a candidate; the counts are of the current block's
    own masks.

    Args:
        request: the sequence.
        steps: of the whole request.
        block_length: tokens of a block.
        alg: low_confidence or random.
    """
    loop = Loop(request)
    prompt_masks = len(loop.masked(0, loop.prompt_len))
    first, step = 0, 0
    for end, block_steps in llada_blocks(request.canvas_len, block_length, steps, prompt_masks):
        stop = loop.prompt_len + end
        masks = len(loop.masked(first, stop))
        for index in range(block_steps):
            count = masks // block_steps + (index < masks % block_steps)
            eligible = loop.masked(0, stop)
            logits = loop.rows(step, eligible)
            scores = loop.scores(logits, step, eligible)
            candidates = scores.argmax(dim=-1)
            if alg == "random":
                confidence = loop.noise("random_order", step, eligible, None)
            else:
                confidence = logits.softmax(dim=-1).gather(1, candidates[:, None])[:, 0]
            loop.unmask(step, eligible, scores, confidence, count)
            step += 1
        first = stop
    return loop.steps


def generate_dream(request: Request, *, steps: int, alg: str, eps: float = 1e-3) -> list[Step]:
    """Dream's loop over the whole canvas.

    Args:
        request: the sequence.
        steps: of the whole request.
        alg: origin, maskgit_plus, topk_margin or entropy.
        eps: last time of the schedule.
    """
    loop = Loop(request)
    times = torch.linspace(1, eps, steps + 1)
    for step in range(steps):
        eligible = loop.masked(0, len(loop.tokens))
        if not len(eligible):
            break
        last = step == steps - 1
        share = 1.0 if last else 1 - times[step + 1] / times[step]
        logits = shape_logits(loop.rows(step, eligible), request.sampling)
        scores = loop.shaped_scores(logits, step, eligible)
        candidates = scores.argmax(dim=-1)
        probabilities = logits.softmax(dim=-1)
        if alg == "origin":
            chosen = loop.noise("origin", step, eligible, None) < share
            confidence = torch.where(chosen, 0.0, -torch.inf)
            count = int(chosen.sum())
        else:
            confidence = _CONFIDENCE[alg](probabilities, candidates)
            count = int(len(eligible) * share)
        loop.unmask(step, eligible, scores, confidence, count)
    return loop.steps


def output_tokens(request: Request, steps: list[Step]) -> list[int]:
    """The canvas after the last step."""
    canvas = [request.mask_token_id] * request.canvas_len
    for step in steps:
        for position, token in zip(step.positions, step.tokens, strict=True):
            if position >= len(request.prompt):
                canvas[position - len(request.prompt)] = token
    return canvas


def shape_logits(logits: Tensor, sampling: Sampling) -> Tensor:
    """Dream's distribution of rows [rows, vocabulary]: temperature, then top_p, then top_k."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        above = ordered.softmax(dim=-1).cumsum(dim=-1) > sampling.top_p
        # The first token above the threshold stays.
        removed = torch.cat((torch.zeros_like(above[:, :1]), above[:, :-1]), dim=-1)
        logits = logits.masked_fill(removed.scatter(1, order, removed), -torch.inf)
    if sampling.top_k > 0:
        count = min(sampling.top_k, logits.shape[1])
        least = logits.topk(count, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _top_probability(probabilities: Tensor, candidates: Tensor) -> Tensor:
    return probabilities.gather(1, candidates[:, None])[:, 0]


def _margin(probabilities: Tensor, candidates: Tensor) -> Tensor:
    top = probabilities.topk(2, dim=-1).values
    return top[:, 0] - top[:, 1]


def _negative_entropy(probabilities: Tensor, candidates: Tensor) -> Tensor:
    # xlogy: 0 log 0 = 0.
    return torch.xlogy(probabilities, probabilities).sum(dim=-1)


_CONFIDENCE = {
    "maskgit_plus": _top_probability,
    "topk_margin": _margin,
    "entropy": _negative_entropy,
}


class Loop:
    """The tokens of a request and what all loops do with them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.prompt_len = len(request.prompt)
        canvas = request.prompt.new_full((request.canvas_len,), request.mask_token_id)
        self.tokens = torch.cat((request.prompt, canvas))
        self.given = self.tokens != request.mask_token_id
        self.sequence = request.new_sequence()
        self.unconditional = request.new_sequence() if request.sampling.cfg_scale > 0 else None
        self.steps: list[Step] = []

    def noise(self, purpose: str, step: int, positions: Tensor, columns: int | None) -> Tensor:
        assert self.request.noise is not None, "this choice is drawn: give noise"
        return self.request.noise(purpose, step, positions, columns).to(self.tokens.device)

    def masked(self, start: int, end: int) -> Tensor:
        """Masked positions in [start, end)."""
        return (self.tokens[start:end] == self.request.mask_token_id).nonzero()[:, 0] + start

    def rows(self, step: int, positions: Tensor) -> Tensor:
        """Logits that decide the positions, guided, [rows, vocabulary]."""
        logits = self.sequence.logits(self.tokens, step)
        if self.unconditional is not None:
            without_prompt = self.tokens.masked_fill(self.given, self.request.mask_token_id)
            base = self.unconditional.logits(without_prompt, step)
            logits = base + (self.request.sampling.cfg_scale + 1) * (logits - base)
        rows = positions - 1 if self.request.logit_shift else positions
        logits = logits[rows.clamp(min=0)]
        if self.request.sampling.forbidden_token is not None:
            logits[:, self.request.sampling.forbidden_token] = -torch.inf
        return logits

    def scores(self, logits: Tensor, step: int, positions: Tensor) -> Tensor:
        """LLaDA's draw: the candidate is the argmax of exp(logits) / (-log u)^temperature.

        Returned is its logarithm, in float64: the exponential of a large logit would overflow.
        """
        temperature = self.request.sampling.temperature
        if temperature == 0:
            return logits
        uniforms = self.noise("candidate", step, positions, logits.shape[1])
        return logits.double() - temperature * (-uniforms.log()).log()

    def shaped_scores(self, logits: Tensor, step: int, positions: Tensor) -> Tensor:
        """Dream's draw, categorical from the shaped distribution, as an argmax likewise."""
        if self.request.sampling.temperature == 0:
            return logits
        uniforms = self.noise("candidate", step, positions, logits.shape[1])
        return logits.double() - (-uniforms.log()).log()

    def unmask(
        self,
        step: int,
        positions: Tensor,
        scores: Tensor,
        confidence: Tensor,
        count: int,
    ) -> None:
        """Write the most confident candidates, or draw them by confidence (alg_temp)."""
        sampling = self.request.sampling
        candidates = scores.argmax(dim=-1)
        for token in sampling.confidence_end_tokens:
            confidence = confidence.masked_fill(candidates == token, -torch.inf)
        if sampling.alg_temp > 0:
            uniforms = self.noise("order_noise", step, positions, None)
            confidence = confidence.double() / sampling.alg_temp - (-uniforms.log()).log()
        count = min(count, len(positions))
        ranked, order = confidence.sort(descending=True, stable=True)
        margin = torch.inf
        if 0 < count < len(positions):
            margin = float(ranked[count - 1] - ranked[count])
        self.write(step, positions, order[:count].sort().values, scores, margin)

    def write(
        self, index: int, positions: Tensor, chosen: Tensor, scores: Tensor, order_margin: float
    ) -> None:
        """Unmask some of the positions, `chosen` ascending indices of them."""
        tokens = scores.argmax(dim=-1)[chosen]
        before = self.tokens.clone()
        self.tokens[positions[chosen]] = tokens
        best = scores[chosen].topk(2, dim=-1).values
        self.steps.append(
            Step(
                index=index,
                before=before,
                positions=tuple(positions[chosen].tolist()),
                tokens=tuple(tokens.tolist()),
                order_margin=order_margin,
                token_margin=float((best[:, 0] - best[:, 1]).min()) if len(chosen) else torch.inf,
            )
        )
