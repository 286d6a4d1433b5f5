"""Checks and dispatch of the decision."""

import os
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.confidence_ranking.torch_path import decide_rows_torch

BLOCK_ROWS: Final = 32
BLOCK_OTHERS: Final = 256
NUM_WARPS: Final = 4
MAX_KERNEL_ROWS: Final = 8192
"""More rows are sorted: the kernel compares each with all others of its request."""


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Rows of several requests, those of a request together.

    Attributes:
        request: int64 [rows], ascending index of each row's request.
        first_row: int64 [requests + 1], where each request's rows begin, and their number.
        num_to_unmask: int64 [requests], how many of its most confident rows are considered.
        order: int64 [rows], a permutation: where each row's decision goes; None: to its place.
    """

    request: Tensor
    first_row: Tensor
    num_to_unmask: Tensor
    order: Tensor | None = None


def decide_rows(
    candidates: Tensor,
    confidence: Tensor,
    rows: RankedRows,
    *,
    uniforms: Tensor | None = None,
    probability: Tensor | None = None,
) -> Tensor:
    """Decide which rows are unmasked: each request's most confident ones, the first among equals.

    CUDA tensors (and any tensor under Triton's interpreter) go to one Triton kernel, CPU tensors
    and more than `MAX_KERNEL_ROWS` rows to PyTorch's sorts. Nothing waits for the device.

    Args:
        candidates: int64 [rows], tokens.
        confidence: float32 or float64 [rows]; not a number is the highest.
        rows: whose rows they are.
        uniforms, probability: float64 [rows] and [requests]: a row is unmasked only where its
            number is below its request's probability. Both or neither.

    Returns:
        int64 [rows]: the candidate of each row that is unmasked, -1 for the others.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
    """
    _check(candidates, confidence, rows, uniforms, probability)
    num_rows = candidates.shape[0]
    out = torch.empty_like(candidates)
    if num_rows == 0:
        return out
    through_kernel = candidates.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not through_kernel or num_rows > MAX_KERNEL_ROWS:
        passes = None
        if uniforms is not None and probability is not None:
            passes = uniforms < probability[rows.request]
        tokens = decide_rows_torch(
            candidates, confidence, rows.request, rows.first_row, rows.num_to_unmask, passes
        )
        return tokens if rows.order is None else out.scatter_(0, rows.order, tokens)

    from vllm_sparsed.kernels.confidence_ranking.kernel import decide_rows_kernel

    decide_rows_kernel[(-(-num_rows // BLOCK_ROWS),)](
        candidates,
        confidence,
        rows.request,
        rows.first_row,
        rows.num_to_unmask,
        confidence if uniforms is None else uniforms,
        confidence if probability is None else probability,
        candidates if rows.order is None else rows.order,
        out,
        num_rows,
        HAS_CHANCE=uniforms is not None,
        HAS_ORDER=rows.order is not None,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_OTHERS=BLOCK_OTHERS,
        num_warps=NUM_WARPS,
    )
    return out


def _check(
    candidates: Tensor,
    confidence: Tensor,
    rows: RankedRows,
    uniforms: Tensor | None,
    probability: Tensor | None,
) -> None:
    num_rows, num_requests = candidates.numel(), rows.num_to_unmask.numel()
    if confidence.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"confidence must be float32 or float64, got {confidence.dtype}")
    if (uniforms is None) != (probability is None):
        raise ValueError("uniforms and probability go together")
    expected = (
        ("candidates", candidates, num_rows, torch.int64),
        ("confidence", confidence, num_rows, confidence.dtype),
        ("rows.request", rows.request, num_rows, torch.int64),
        ("rows.first_row", rows.first_row, num_requests + 1, torch.int64),
        ("rows.num_to_unmask", rows.num_to_unmask, num_requests, torch.int64),
        ("rows.order", rows.order, num_rows, torch.int64),
        ("uniforms", uniforms, num_rows, torch.float64),
        ("probability", probability, num_requests, torch.float64),
    )
    for name, x, length, dtype in expected:
        if x is not None and (x.shape != (length,) or x.dtype != dtype or x.stride(0) != 1):
            raise ValueError(
                f"{name} must be contiguous {dtype} [{length}], got {x.dtype} {tuple(x.shape)}"
            )
