"""The statistics in PyTorch, of probabilities that are already there."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.token_confidence.configs import Statistic


def statistic_torch(probabilities: Tensor, tokens: Tensor, statistic: Statistic) -> Tensor:
    """The statistic of each row, float32 [rows].

    Args:
        probabilities: float32 [rows, vocab].
        tokens: int64 [rows], the candidates.
        statistic: which.
    """
    if statistic == Statistic.PROBABILITY:
        return probabilities.gather(1, tokens[:, None])[:, 0]
    if statistic == Statistic.MARGIN:
        top = probabilities.topk(2, dim=1).values
        return top[:, 0] - top[:, 1]
    # Subtracted from 0, not negated: -0.0 and 0.0 must not sort apart.
    return 0.0 - torch.special.entr(probabilities).sum(dim=1)
