"""The decision by stable sorts: on CPUs, and for many candidates."""

import math

import torch
from torch import Tensor

from vllm_sparsed.kernels.confidence_ranking.configs import (
    ENTROPY_UNIT,
    NOT_FINITE,
    UNDECIDED,
    Rule,
)


def decide_torch(
    tokens: Tensor,
    confidence: Tensor,
    group: Tensor,
    first: Tensor,
    rule: Tensor,
    quota: Tensor,
    bound: Tensor,
    mask_token_id: int,
    passes: Tensor | None,
) -> Tensor:
    """As `decide_reference`, on tensors; group: int64 [candidates], ascending."""
    finite = confidence == confidence
    rule = rule[group]
    eligible = finite & ((rule == Rule.COUNT) | (tokens != mask_token_id))
    ranking = confidence.sort(descending=True, stable=True).indices
    ranking = ranking[(~eligible)[ranking].sort(stable=True).indices]
    ranking = ranking[group[ranking].sort(stable=True).indices]
    rank = torch.empty_like(tokens)
    start = first[group]
    # Groups keep their places, so the sorted candidates have the same bounds.
    rank.scatter_(0, ranking, torch.arange(len(tokens), device=tokens.device) - start)

    value = confidence.double()
    entropy = (-value).clamp(min=0.0).masked_fill(~eligible | (value == -math.inf), 0.0)
    units = (entropy * (1 / ENTROPY_UNIT)).to(torch.int64)[ranking]
    before = units.cumsum(0) - units
    sum_before = torch.empty_like(before)
    sum_before.scatter_(0, ranking, before - before[start])

    bound = bound[group]
    selected = rank < quota[group]
    selected |= (rule == Rule.THRESHOLD) & (value >= bound)
    selected |= (rule == Rule.FACTOR) & (value >= 1.0 - bound / (rank + 2))
    selected |= (
        (rule == Rule.ENTROPY_BOUND)
        & (value > -math.inf)
        & (sum_before.double() * ENTROPY_UNIT <= bound)
    )
    selected |= (rule == Rule.ENTROPY_THRESHOLD) & (-value < bound)
    selected &= eligible
    if passes is not None:
        selected &= passes
    decided = torch.where(selected, tokens, UNDECIDED)
    return torch.where(finite, decided, NOT_FINITE)
