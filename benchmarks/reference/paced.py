"""Deciding what the model is sure of, several tokens a pass: the plain loop of each pace.

Threshold and factor as in Fast-dLLM (arXiv 2505.22618), the entropy bound as in EB-Sampler (arXiv
2505.24857), the entropy threshold and several open blocks as in d3LLM.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.reference.generate import Loop, Request, Step, llada_blocks


@dataclass(frozen=True, slots=True)
class Pace:
    """What is decided in a pass.

    Attributes:
        name: threshold, factor, entropy_bound or entropy_threshold.
        value: of it.
        block_length: tokens of a block.
        steps: most passes of the whole request; None: as many as masks.
        margin: whether a threshold's confidence is the margin of the two most probable tokens.
        block_add: share of the last open block that is decided before the next one opens; None: one
            block at a time.
        block_full: share of its predecessor from which on a block has a token decided in each pass.
    """

    name: str
    value: float
    block_length: int
    steps: int | None = None
    margin: bool = False
    block_add: float | None = None
    block_full: float = 0.95


def generate_paced(request: Request, pace: Pace) -> list[Step]:
    """Decode block after block until none has a mask left, or its passes are used up."""
    loop = Loop(request)
    prompt_masks = len(loop.masked(0, loop.prompt_len))
    unlimited = (request.canvas_len + prompt_masks) * request.canvas_len
    blocks = llada_blocks(
        request.canvas_len, pace.block_length, pace.steps or unlimited, prompt_masks
    )
    ends = [loop.prompt_len + end for end, _ in blocks]
    starts = [0, *ends[:-1]]
    totals = [len(loop.masked(start, end)) for start, end in zip(starts, ends, strict=True)]

    def share(block: int) -> float:
        return 1 - len(loop.masked(starts[block], ends[block])) / totals[block]

    current, used, num_open = 0, 0, 1
    while current < len(blocks):
        num_open = max(num_open, current + 1)
        if pace.block_add is not None:
            while num_open < len(blocks) and share(num_open - 1) >= pace.block_add - 1e-12:
                num_open += 1
        # Where the random numbers are: passes that earlier blocks did not need count too.
        step = sum(passes for _, passes in blocks[:current]) + used
        eligible = loop.masked(0, ends[num_open - 1])
        logits = loop.rows(step, eligible)
        scores = loop.scores(logits, step, eligible)
        is_last = used == blocks[current][1] - 1
        chosen, margins = [], [torch.inf]
        for block in range(current, num_open):
            start = 0 if block == current else starts[block]
            among = ((eligible >= start) & (eligible < ends[block])).nonzero()[:, 0].tolist()
            if block == current and is_last:
                chosen += among
                continue
            at_least = int(block == current or share(block - 1) >= pace.block_full - 1e-12)
            decided, margin = _choose(loop, pace, logits, scores, among, at_least)
            chosen += decided
            margins.append(margin)
        loop.write(
            len(loop.steps), eligible, torch.tensor(sorted(chosen)).long(), scores, min(margins)
        )
        used += 1
        while current < len(blocks) and (
            used >= blocks[current][1] or not len(loop.masked(starts[current], ends[current]))
        ):
            current, used = current + 1, 0
    return loop.steps


def _choose(
    loop: Loop, pace: Pace, logits: Tensor, scores: Tensor, among: list[int], at_least: int
) -> tuple[list[int], float]:
    """Which of the rows `among` are decided, and by how much."""
    candidates = scores.argmax(dim=-1).tolist()
    probabilities = logits.softmax(dim=-1)
    sampling = loop.request.sampling

    def value(row: int) -> float:
        """What the rule judges: a confidence, or minus an entropy."""
        if candidates[row] in sampling.confidence_end_tokens:
            return -torch.inf
        p = probabilities[row]
        if pace.name.startswith("entropy"):
            return float(torch.xlogy(p, p).sum())
        if pace.margin and pace.name == "threshold":
            first, second = p.topk(2).values.tolist()
            return float(first - second)
        return float(p[candidates[row]])

    rows = [row for row in among if candidates[row] != loop.request.mask_token_id]
    values = {row: value(row) for row in rows}
    ranked = sorted(rows, key=lambda row: (-values[row], row))
    decided = []
    margins = [torch.inf]
    entropies = 0.0
    for n, row in enumerate(ranked, start=1):
        distance = {
            "threshold": values[row] - pace.value,
            "factor": values[row] - (1 - pace.value / (n + 1)),
            "entropy_bound": -torch.inf if values[row] == -torch.inf else pace.value - entropies,
            "entropy_threshold": pace.value + values[row],
        }[pace.name]
        passes = distance > 0 if pace.name == "entropy_threshold" else distance >= 0
        if n <= at_least:
            # Decided by being the best: by as much as it is better.
            if not passes and n < len(ranked):
                margins.append(values[row] - values[ranked[n]])
        else:
            margins.append(abs(distance))
        if n <= at_least or passes:
            decided.append(row)
        entropies -= values[row]
    return decided, min(margins)
