"""The cutoff by sorting, row by row."""

import math
from collections.abc import Sequence


def logit_cutoff_reference(logits: Sequence[float], top_p: float, top_k: int) -> float:
    """The smallest of a row's logits that stays.

    Args:
        logits: of one row, temperature applied.
        top_p: a logit stays while the probability of all larger ones is at most this; 1: off.
        top_k: so many of the largest stay, with their equals; 0: off.
    """
    ordered = sorted(logits, reverse=True)
    weights = [math.exp(x - ordered[0]) for x in ordered]
    total = math.fsum(weights)
    cutoff = ordered[-1]
    if top_p < 1:
        cutoff = min(
            x
            for x in ordered
            if math.fsum(w for y, w in zip(ordered, weights, strict=True) if y > x) <= top_p * total
        )
    if top_k > 0:
        cutoff = max(cutoff, ordered[min(top_k, len(ordered)) - 1])
    return cutoff
