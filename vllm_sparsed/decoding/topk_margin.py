"""Dream's `topk_margin`: the clearest decisions first."""

from torch import Tensor

from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.unmask_counts import timestep_share
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class TopkMargin:
    """Confidence is the margin between the two most probable tokens."""

    name = "topk_margin"
    shapes_confidence = True
    statistic = Statistic.MARGIN

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        return timestep_share(masks_left, step, steps, eps)

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        return 1.0

    def confidence(self, proposal: Proposal) -> Tensor:
        top = proposal.probabilities().topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
