"""Checks and dispatch of the decision."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_sparsed.kernels.confidence_ranking.configs import (
    BLOCK_CANDIDATES,
    BLOCK_OTHERS,
    ENTROPY_UNIT,
    MAX_KERNEL_CANDIDATES,
    NUM_WARPS,
)
from vllm_sparsed.kernels.confidence_ranking.torch_path import decide_torch


@dataclass(frozen=True, slots=True)
class Groups:
    """Candidates that compete with each other, those of a group together.

    Attributes:
        group: int64 [candidates], ascending index of each candidate's group.
        first: int64 [groups + 1], where each group's candidates begin, and their number.
        rule: int64 [groups], see `Rule`; None: COUNT everywhere.
        quota: int64 [groups], how many of its most confident candidates are decided by any rule.
        bound: float64 [groups], of its rule; None where `rule` is.
    """

    group: Tensor
    first: Tensor
    quota: Tensor
    rule: Tensor | None = None
    bound: Tensor | None = None


def decide(
    tokens: Tensor,
    confidence: Tensor,
    groups: Groups,
    mask_token_id: int,
    *,
    uniforms: Tensor | None = None,
    probability: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Decide which candidates become tokens: each group's most confident ones, as its rule says.

    CUDA tensors (and any tensor under Triton's interpreter) go to one Triton kernel, CPU tensors
    and more than `MAX_KERNEL_CANDIDATES` candidates to PyTorch's sorts. Nothing waits for the
    device. What a group decides depends on that group alone.

    Args:
        tokens: int64 [candidates], what each would become.
        confidence: float32 or float64 [candidates]; among equals the first is the most confident.
        groups: whose candidates they are.
        mask_token_id: a token that every rule but COUNT passes over.
        uniforms, probability: float64 [candidates] and [groups]: a candidate is decided only where
            its number is below its group's probability. Both or neither.
        order: int64 [candidates], a permutation: where each decision goes; None: to its place.

    Returns:
        int64 [candidates]: the token of each candidate that is decided, NOT_FINITE where the
        confidence is not a number, else UNDECIDED.

    Raises:
        ValueError: an argument has a wrong shape or dtype.
    """
    _check(tokens, confidence, groups, uniforms, probability, order)
    num_candidates = tokens.shape[0]
    out = torch.empty_like(tokens)
    if num_candidates == 0:
        return out
    through_kernel = tokens.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not through_kernel or num_candidates > MAX_KERNEL_CANDIDATES:
        passes = None
        if uniforms is not None and probability is not None:
            passes = uniforms < probability[groups.group]
        decided = decide_torch(
            tokens,
            confidence,
            groups.group,
            groups.first,
            torch.zeros_like(groups.quota) if groups.rule is None else groups.rule,
            groups.quota,
            groups.quota.double() if groups.bound is None else groups.bound,
            mask_token_id,
            passes,
        )
        return decided if order is None else out.scatter_(0, order, decided)

    from vllm_sparsed.kernels.confidence_ranking.kernel import decide_kernel

    decide_kernel[(-(-num_candidates // BLOCK_CANDIDATES),)](
        tokens,
        confidence,
        groups.group,
        groups.first,
        groups.quota if groups.rule is None else groups.rule,
        groups.quota,
        confidence if groups.bound is None else groups.bound,
        confidence if uniforms is None else uniforms,
        confidence if probability is None else probability,
        tokens if order is None else order,
        out,
        num_candidates,
        mask_token_id,
        HAS_RULES=groups.rule is not None,
        HAS_CHANCE=uniforms is not None,
        HAS_ORDER=order is not None,
        ENTROPY_UNIT=ENTROPY_UNIT,
        BLOCK_CANDIDATES=BLOCK_CANDIDATES,
        BLOCK_OTHERS=BLOCK_OTHERS,
        num_warps=NUM_WARPS,
    )
    return out


def _check(
    tokens: Tensor,
    confidence: Tensor,
    groups: Groups,
    uniforms: Tensor | None,
    probability: Tensor | None,
    order: Tensor | None,
) -> None:
    num_candidates, num_groups = tokens.numel(), groups.quota.numel()
    if confidence.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"confidence must be float32 or float64, got {confidence.dtype}")
    if (uniforms is None) != (probability is None):
        raise ValueError("uniforms and probability go together")
    if (groups.rule is None) != (groups.bound is None):
        raise ValueError("groups.rule and groups.bound go together")
    expected = (
        ("tokens", tokens, num_candidates, torch.int64),
        ("confidence", confidence, num_candidates, confidence.dtype),
        ("groups.group", groups.group, num_candidates, torch.int64),
        ("groups.first", groups.first, num_groups + 1, torch.int64),
        ("groups.rule", groups.rule, num_groups, torch.int64),
        ("groups.quota", groups.quota, num_groups, torch.int64),
        ("groups.bound", groups.bound, num_groups, torch.float64),
        ("uniforms", uniforms, num_candidates, torch.float64),
        ("probability", probability, num_groups, torch.float64),
        ("order", order, num_candidates, torch.int64),
    )
    for name, x, length, dtype in expected:
        if x is not None and (x.shape != (length,) or x.dtype != dtype or x.stride(0) != 1):
            raise ValueError(
                f"{name} must be contiguous {dtype} [{length}], got {x.dtype} {tuple(x.shape)}"
            )
