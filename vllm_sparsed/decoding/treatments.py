"""What is done alike to the logits of many candidates."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from vllm_sparsed.decoding.algorithms import ALGORITHMS, Order, Ranking
from vllm_sparsed.decoding.candidates import Candidates
from vllm_sparsed.kernels.token_confidence.configs import Statistic

# vLLM's own limit: a request below it is greedy.
_LEAST_TEMPERATURE: Final = 1e-5

RANKINGS: Final = tuple(
    dict.fromkeys(
        (
            *(algorithm.ranking for algorithm in ALGORITHMS.values()),
            *(Ranking(statistic, shaped=False) for statistic in Statistic),
        )
    )
)
_INDEX: Final = {ranking: index for index, ranking in enumerate(RANKINGS)}


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done to a run of candidates."""

    ranking: Ranking
    guided: bool
    sampled: bool
    top_p: bool
    top_k: bool
    without_eos: bool

    @property
    def cuts(self) -> bool:
        """Whether top_p or top_k take tokens out of the distribution."""
        return self.top_p or self.top_k

    @property
    def ranked(self) -> bool:
        """Whether the statistic is the order."""
        return self.ranking.order == Order.CONFIDENCE


@dataclass(frozen=True, slots=True)
class Segment:
    """Candidates [start, end), in decoding order, of one treatment."""

    start: int
    end: int
    treatment: Treatment


def treatment_codes(candidates: Candidates) -> npt.NDArray[np.int64]:
    """One number per request [B]: equal numbers, equal treatment; guided requests' are lowest."""
    ranking = np.array([_INDEX[ranking] for ranking in candidates.rankings], dtype=np.int64)
    shaped = np.array([ranking.shaped for ranking in candidates.rankings], dtype=np.bool_)
    sampled = candidates.temperature >= _LEAST_TEMPERATURE
    # Cutting the tail off does not move the argmax.
    cut = sampled | shaped
    codes: npt.NDArray[Any] = np.where(candidates.cfg_scale > 0, 0, len(RANKINGS)) + ranking
    for flag in (
        sampled,
        cut & (candidates.top_p < 1),
        cut & (candidates.top_k > 0),
        candidates.logits_eos_inf,
    ):
        codes = codes * 2 + flag
    return codes


def segments_of(codes: npt.NDArray[np.int64]) -> tuple[Segment, ...]:
    """Runs of equal codes [R]."""
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), codes.size]
    return tuple(
        Segment(start, end, _treatment(int(codes[start]))) for start, end in pairwise(bounds)
    )


def _treatment(code: int) -> Treatment:
    unguided, ranking = divmod(code >> 4, len(RANKINGS))
    return Treatment(
        ranking=RANKINGS[ranking],
        guided=not unguided,
        sampled=bool(code & 8),
        top_p=bool(code & 4),
        top_k=bool(code & 2),
        without_eos=bool(code & 1),
    )
