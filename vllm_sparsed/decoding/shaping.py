"""Guidance, top_p, top_k and the draw of candidates, row by row of a matrix of logits."""

import math

import torch
from torch import Tensor

from vllm_sparsed.decoding.rng import gumbel


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance: u + (c + 1)(l - u), in float32.

    Args:
        conditional, unconditional: l and u, [rows, vocab].
        scale: c, float64 [rows].
    """
    base = unconditional.float()
    return base + (scale + 1).float()[:, None] * (conditional.float() - base)


def keep_top_p(logits: Tensor, top_p: Tensor) -> Tensor:
    """Return the logits with -inf outside the smallest set of tokens whose probability exceeds p.

    The first token above the threshold stays, as in Dream's reference.

    Args:
        logits: float32 [rows, vocab].
        top_p: float64 [rows].
    """
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=1)
    if len(probabilities) == 1:
        # Twice: CUDA's scan of a tensor that is one row adds in an order that varies.
        probabilities = probabilities.expand(2, -1)
    above = probabilities.cumsum(dim=1)[: len(logits)] > top_p.float()[:, None]
    removed = torch.zeros_like(above)
    removed.scatter_(1, order[:, 1:], above[:, :-1])
    return logits.masked_fill(removed, -math.inf)


def keep_top_k(logits: Tensor, top_k: Tensor, largest: int) -> Tensor:
    """Return the logits with -inf below the k-th largest of each row; its ties stay.

    Args:
        logits: float32 [rows, vocab].
        top_k: int64 [rows], each from 1 to `largest`.
        largest: at most the vocabulary size; known on the host.
    """
    best = logits.topk(largest, dim=1).values
    threshold = best.gather(1, top_k[:, None] - 1)
    return logits.masked_fill(logits < threshold, -math.inf)


def draw(logits: Tensor, temperature: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of each row from softmax(logits / temperature).

    It is LLaDA's argmax of exp(logits) / (-log u)^temperature in float64, as a logarithm: the
    exponential of a large logit would overflow.

    Args:
        logits: [rows, vocab].
        temperature: float64 [rows], above 0.
        uniforms: float64 [rows, vocab] in (0, 1).

    Returns:
        int64 [rows].
    """
    noise = gumbel(uniforms).mul_(temperature[:, None])
    return noise.add_(logits).argmax(dim=1)
