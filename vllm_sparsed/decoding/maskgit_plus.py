"""Dream's `maskgit_plus`: the candidates of highest probability first."""

from torch import Tensor

from vllm_sparsed.decoding.protocol import Proposal
from vllm_sparsed.decoding.unmask_counts import timestep_share
from vllm_sparsed.kernels.token_confidence.configs import Statistic


class MaskgitPlus:
    """Confidence is the candidate's probability in the shaped distribution."""

    name = "maskgit_plus"
    shapes_confidence = True
    statistic = Statistic.PROBABILITY

    def num_to_unmask(
        self, masks_at_start: int, masks_left: int, step: int, steps: int, eps: float
    ) -> int:
        return timestep_share(masks_left, step, steps, eps)

    def unmask_probability(self, step: int, steps: int, eps: float) -> float:
        return 1.0

    def confidence(self, proposal: Proposal) -> Tensor:
        return proposal.probabilities().gather(1, proposal.candidates[:, None])[:, 0]
