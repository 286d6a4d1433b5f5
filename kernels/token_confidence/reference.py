"""Candidates and statistics in plain PyTorch."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.token_confidence.configs import Statistic


def token_confidence_reference(
    logits: Tensor,
    statistic: Statistic,
    noise: Tensor | None = None,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Candidates int64 [rows] and the statistic [rows].

    Args:
        logits: [rows, vocab], in the precision to compute in.
        statistic: of softmax(logits), or of softmax(logits / temperature).
        noise: [rows, vocab], added to the logits before the argmax; None: nothing is added.
        temperature: [rows]; None: 1.
    """
    candidates = (logits if noise is None else logits + noise).argmax(dim=1)
    shaped = logits if temperature is None else logits / temperature[:, None]
    probabilities = shaped.softmax(dim=1)
    if statistic == Statistic.PROBABILITY:
        return candidates, probabilities.gather(1, candidates[:, None])[:, 0]
    if statistic == Statistic.MARGIN:
        top = probabilities.topk(2, dim=1).values
        return candidates, top[:, 0] - top[:, 1]
    return candidates, 0.0 - torch.special.entr(probabilities).sum(dim=1)
