"""Checks and launch of the cutoff."""

import torch
from torch import Tensor

from vllm_sparsed.kernels.logit_cutoff.configs import BLOCK, NUM_WARPS, WAYS


def logit_cutoff(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    top_k: Tensor | None = None,
) -> Tensor:
    """The smallest logit of each row that top_p and then top_k keep, as in Dream's reference.

    A Triton kernel, for CUDA tensors (and any tensor under Triton's interpreter), which sorts
    nothing: it searches the threshold over the bits of float32. vLLM's kernels of the same purpose
    stop their search after 18 halvings, add up in an order that depends on the batch, take top_k
    first and cut through equal logits; here a row's cutoff depends on that row alone, and of equal
    logits all stay or none.

    Args:
        logits: [rows, vocab], bfloat16, float16 or float32; rows may be strided.
        temperature: float64 [rows]; the cutoff is of logits / temperature in float32. None: 1.
        top_p: float64 [rows]; a logit stays while the probability of all larger ones is at most it.
        top_k: int64 [rows], from 1 on; so many of the largest stay, with their equals.

    Returns:
        float32 [rows]: what is below it goes. Undefined for rows with NaN.

    Raises:
        ValueError: an argument has a wrong shape, dtype or stride.
    """
    if logits.dim() != 2 or not logits.shape[1] or logits.stride(1) != 1:
        raise ValueError(
            f"logits must be [rows, vocab] with contiguous rows, got {tuple(logits.shape)} with "
            f"strides {logits.stride()}"
        )
    num_rows = logits.shape[0]
    for name, x, dtype in (
        ("temperature", temperature, torch.float64),
        ("top_p", top_p, torch.float64),
        ("top_k", top_k, torch.int64),
    ):
        if x is not None and (x.shape != (num_rows,) or x.dtype != dtype or not x.is_contiguous()):
            raise ValueError(
                f"{name} must be contiguous {dtype} [{num_rows}], got {x.dtype} {tuple(x.shape)}"
            )
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        import triton

        from vllm_sparsed.kernels.logit_cutoff.kernel import logit_cutoff_kernel

        logit_cutoff_kernel[(num_rows,)](
            logits,
            out if temperature is None else temperature,
            out if top_p is None else top_p,
            out if top_k is None else top_k,
            out,
            logits.shape[1],
            logits.stride(0),
            SCALED=temperature is not None,
            TOP_P=top_p is not None,
            TOP_K=top_k is not None,
            BLOCK=min(BLOCK, triton.next_power_of_2(logits.shape[1])),
            WAYS=WAYS,
            num_warps=NUM_WARPS,
        )
    return out
