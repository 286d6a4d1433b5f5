"""Checks and launch of candidates and statistics."""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random import stream_key
from vllm_sparsed.kernels.token_confidence.configs import BLOCK, DRAW_BLOCK, NUM_WARPS, Statistic

_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Draw:
    """Draw candidates from softmax(logits / temperature): the argmax of logits + temperature * g
    with g standard Gumbel noise in float64, which depends on the coordinates alone.

    Attributes:
        temperature: float64 [rows], above 0.
        seed, step, position: int64 [rows], coordinates of each row's random numbers.
        stream: of random numbers, at least 0.
    """

    temperature: Tensor
    seed: Tensor
    step: Tensor
    position: Tensor
    stream: int


def token_confidence(
    logits: Tensor,
    statistic: Statistic,
    draw: Draw | None = None,
    *,
    cutoff: Tensor | None = None,
    shaped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Candidate of each row and a statistic of its distribution, in one pass over the logits.

    A Triton kernel, for CUDA tensors (and any tensor under Triton's interpreter); sums are float32.
    Nothing of size [rows, vocab] is allocated. A row's result depends on that row alone.

    Args:
        logits: [rows, vocab], bfloat16, float16 or float32; rows may be strided.
        statistic: what to compute beside the candidate.
        draw: how to draw the candidate; None: the argmax. Among equals the first token.
        cutoff: float32 [rows]; nothing is drawn whose logit / temperature is below it.
        shaped: whether the statistic is of what temperature and cutoff leave of the distribution,
            not of softmax(logits).

    Returns:
        Candidates, int64 [rows], always within the vocabulary; the statistic, float32 [rows], NaN
        for a row that has NaN or infinity in it or is -inf alone.

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride.
    """
    if logits.dim() != 2 or not logits.shape[1] or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [rows, vocab] with contiguous rows, got {tuple(logits.shape)} with "
            f"strides {logits.stride()}"
        )
    if logits.dtype not in _DTYPES:
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    num_rows, vocab_size = logits.shape
    candidates = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    fields = (candidates,) * 4
    if draw is not None:
        fields = (draw.temperature, draw.seed, draw.step, draw.position)
        for name, x, dtype in zip(
            ("temperature", "seed", "step", "position"),
            fields,
            (torch.float64, *(torch.int64,) * 3),
            strict=True,
        ):
            if x.shape != (num_rows,) or x.dtype != dtype or not x.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous {dtype} [{num_rows}], got {x.dtype} "
                    f"{tuple(x.shape)}"
                )
    if cutoff is not None and (cutoff.shape != (num_rows,) or cutoff.dtype != torch.float32):
        raise ValueError(
            f"cutoff must be torch.float32 [{num_rows}], got {cutoff.dtype} {tuple(cutoff.shape)}"
        )
    if num_rows:
        from vllm_sparsed.kernels.token_confidence.kernel import token_confidence_kernel

        token_confidence_kernel[(num_rows,)](
            logits,
            candidates,
            values,
            *fields,
            values if cutoff is None else cutoff,
            vocab_size,
            logits.stride(0),
            STATISTIC=int(statistic),
            DRAWN=draw is not None,
            CUT=cutoff is not None,
            SHAPED=shaped and (draw is not None or cutoff is not None),
            STREAM_KEY=0 if draw is None else stream_key(draw.stream),
            BLOCK=BLOCK if draw is None else DRAW_BLOCK,
            num_warps=NUM_WARPS,
        )
    return candidates, values
