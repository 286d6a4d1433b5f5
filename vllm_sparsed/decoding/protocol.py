"""What a decoding strategy decides, and what it is given to decide it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from vllm_sparsed.kernels.token_confidence.configs import Statistic


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidate tokens of some rows, with what a confidence may need.

    Attributes:
        candidates: int64 [rows].
        probabilities: returns float32 [rows, vocab]: the plain softmax of the logits, or the
            distribution after temperature, top_p and top_k where the decoder `shapes_confidence`.
        noise: returns float64 [rows], uniform in (0, 1).
    """

    candidates: Tensor
    probabilities: Callable[[], Tensor]
    noise: Callable[[], Tensor]


class Decoder(Protocol):
    """A strategy: how many masks a step decides, and in which order.

    Attributes:
        name: what `diffusion_alg` calls it.
        shapes_confidence: whether temperature, top_p and top_k shape the distribution behind the
            confidence (Dream), or the draw of the candidate alone.
        statistic: of that distribution, which is the confidence; NONE where it is about neither.
    """

    @property
    def name(self) -> str: ...

    @property
    def shapes_confidence(self) -> bool: ...

    @property
    def statistic(self) -> Statistic: ...

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        """Return how many masks of a block this step unmasks at most.

        Args:
            masks_at_start: masks in the block when its first step began.
            masks_left: masks in it now.
            step: 0-based step within the block.
            steps: steps of the block.
            eps: last time of Dream's schedule.
        """
        ...

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        """Return the probability with which each mask among those counted is unmasked."""
        ...

    def confidence(self, proposal: Proposal) -> Tensor:
        """Return a float [rows]; the highest are unmasked first."""
        ...
