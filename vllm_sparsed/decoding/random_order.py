"""LLaDA's `random`: candidates in random order."""

from torch import Tensor

from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.unmask_counts import even_share
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class RandomOrder:
    """Confidence is uniform noise."""

    name = "random"
    shapes_confidence = False
    statistic = Statistic.NONE

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        return even_share(masks_at_start, step, steps)

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        return 1.0

    def confidence(self, proposal: Proposal) -> Tensor:
        return proposal.noise()
