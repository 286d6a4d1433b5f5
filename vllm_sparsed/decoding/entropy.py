"""Dream's `entropy`: the rows of lowest entropy first."""

import torch
from torch import Tensor

from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.unmask_counts import timestep_share
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class Entropy:
    """Confidence is the negative entropy in nats, with 0 log 0 = 0."""

    name = "entropy"
    shapes_confidence = True
    statistic = Statistic.NEGATIVE_ENTROPY

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        return timestep_share(masks_left, step, steps, eps)

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        return 1.0

    def confidence(self, proposal: Proposal) -> Tensor:
        # Subtracted from 0, not negated: -0.0 and 0.0 must not sort apart.
        return 0.0 - torch.special.entr(proposal.probabilities()).sum(dim=1)
