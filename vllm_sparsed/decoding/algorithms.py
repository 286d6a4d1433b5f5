"""The algorithms of LLaDA and Dream as one table: in which order candidates come, and how many of
them a step of the schedule decides."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from vllm_sparsed.decoding.unmask_counts import even_share, timestep_probability, timestep_share
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class Order(Enum):
    """CONFIDENCE: the highest statistic first. RANDOM: by uniform noise. NONE: all are equal."""

    CONFIDENCE = 0
    RANDOM = 1
    NONE = 2


class Schedule(Enum):
    """EVEN: LLaDA's even shares. TIMES: Dream's schedule of times. CHANCE: the same, where chance
    decides each mask on its own."""

    EVEN = 0
    TIMES = 1
    CHANCE = 2


@dataclass(frozen=True, slots=True)
class Ranking:
    """What puts candidates in order.

    Attributes:
        statistic: the confidence; where the order is not by confidence, it shows alone whether the
            logits were finite.
        shaped: whether temperature, top_p and top_k shape the distribution behind the statistic
            (Dream), or the draw of the candidate alone.
        order: how it is used.
    """

    statistic: Statistic
    shaped: bool
    order: Order = Order.CONFIDENCE


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One value of `diffusion_alg`."""

    name: str
    ranking: Ranking
    schedule: Schedule

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        """How many candidates a step of the schedule unmasks at most.

        Args:
            masks_at_start: masks in the block when its first step began.
            masks_left: candidates now.
            step: 0-based step within the block.
            steps: steps of the block.
            eps: last time of Dream's schedule.
        """
        if self.schedule == Schedule.EVEN:
            return even_share(masks_at_start, step, steps)
        if self.schedule == Schedule.TIMES:
            return timestep_share(masks_left, step, steps, eps)
        return masks_left

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        """The probability with which each candidate among those counted is unmasked."""
        if self.schedule == Schedule.CHANCE:
            return timestep_probability(step, steps, eps)
        return 1.0


_PLAIN_PROBABILITY: Final = Ranking(Statistic.PROBABILITY, shaped=False)

_ALL: Final = (
    Algorithm("low_confidence", _PLAIN_PROBABILITY, Schedule.EVEN),
    Algorithm("random", Ranking(Statistic.PROBABILITY, False, Order.RANDOM), Schedule.EVEN),
    Algorithm("origin", Ranking(Statistic.PROBABILITY, False, Order.NONE), Schedule.CHANCE),
    Algorithm("maskgit_plus", Ranking(Statistic.PROBABILITY, shaped=True), Schedule.TIMES),
    Algorithm("topk_margin", Ranking(Statistic.MARGIN, shaped=True), Schedule.TIMES),
    Algorithm("entropy", Ranking(Statistic.NEGATIVE_ENTROPY, shaped=True), Schedule.TIMES),
)

ALGORITHMS: Final[Mapping[str, Algorithm]] = MappingProxyType(
    {algorithm.name: algorithm for algorithm in _ALL}
)
