"""The decision in plain Python, group by group."""

import math
from collections.abc import Sequence

from vllm_sparsed.kernels.confidence_ranking.configs import NOT_FINITE, UNDECIDED, Rule


def decide_reference(
    tokens: Sequence[int],
    confidences: Sequence[float],
    first: Sequence[int],
    rules: Sequence[int],
    quotas: Sequence[int],
    bounds: Sequence[float],
    mask_token_id: int,
    passes: Sequence[bool] | None = None,
) -> list[int]:
    """What each candidate is decided to be, UNDECIDED or NOT_FINITE.

    Args:
        tokens, confidences: of the candidates.
        first: [groups + 1], where each group's candidates begin, and their number.
        rules, quotas, bounds: [groups], see `Rule`.
        mask_token_id: passed over with every rule but COUNT.
        passes: whether a candidate that is to be decided is; None: all are.
    """
    decided = [NOT_FINITE if math.isnan(c) else UNDECIDED for c in confidences]
    for group, (rule, quota, bound) in enumerate(zip(rules, quotas, bounds, strict=True)):
        members = [
            i
            for i in range(first[group], first[group + 1])
            if not math.isnan(confidences[i]) and (rule == Rule.COUNT or tokens[i] != mask_token_id)
        ]
        sum_before = 0.0
        for rank, i in enumerate(sorted(members, key=lambda i: (-confidences[i], i))):
            confidence = confidences[i]
            within = {
                Rule.COUNT: False,
                Rule.THRESHOLD: confidence >= bound,
                Rule.FACTOR: confidence >= 1 - bound / (rank + 2),
                Rule.ENTROPY_BOUND: confidence > -math.inf and sum_before <= bound,
                Rule.ENTROPY_THRESHOLD: -confidence < bound,
            }[Rule(rule)]
            sum_before += max(0.0, -confidence)
            if (rank < quota or within) and (passes is None or passes[i]):
                decided[i] = tokens[i]
    return decided
