"""The paces: rules that decide what the model is sure of, in place of a schedule.

Threshold and factor are Fast-dLLM's (arXiv 2505.22618), the entropy bound is EB-Sampler's (arXiv
2505.24857), the entropy threshold d3LLM's. All judge by the plain softmax of the logits, without
temperature, top_p and top_k.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vllm_sparsed.decoding.algorithms import ALGORITHMS, Ranking
from vllm_sparsed.kernels.confidence_ranking.configs import Rule
from vllm_sparsed.kernels.token_confidence.configs import Statistic

RULES: Final[Mapping[str, Rule]] = {
    "threshold": Rule.THRESHOLD,
    "factor": Rule.FACTOR,
    "entropy_bound": Rule.ENTROPY_BOUND,
    "entropy_threshold": Rule.ENTROPY_THRESHOLD,
}
"""By the names of `parameter_table.PACES`."""


@dataclass(frozen=True, slots=True)
class Selection:
    """How a group of candidates is decided in one pass.

    Attributes:
        size: candidates of the group.
        quota: how many of the best are decided by any rule.
        rule, bound: which others are.
    """

    size: int
    quota: int
    rule: Rule = Rule.COUNT
    bound: float = 0.0


def ranking_of(alg: str, pace: str | None) -> Ranking:
    """What orders the candidates of a request, and what its pace judges.

    Args:
        alg: name in `ALGORITHMS`.
        pace: name in `RULES`; None: the algorithm's own order.
    """
    if pace is None:
        return ALGORITHMS[alg].ranking
    if pace in ("entropy_bound", "entropy_threshold"):
        return Ranking(Statistic.NEGATIVE_ENTROPY, shaped=False)
    if pace == "threshold":
        return Ranking(ALGORITHMS[alg].ranking.statistic, shaped=False)
    return Ranking(Statistic.PROBABILITY, shaped=False)
