"""Dream's `origin`: each mask is unmasked with the probability that the schedule gives."""

import torch
from torch import Tensor

from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.unmask_counts import timestep_probability
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class Origin:
    """All masks are counted, none is preferred; chance decides each on its own."""

    name = "origin"
    shapes_confidence = False
    statistic = Statistic.NONE

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        return masks_left

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        return timestep_probability(step, steps, eps)

    def confidence(self, proposal: Proposal) -> Tensor:
        return torch.zeros_like(proposal.candidates, dtype=torch.float32)
