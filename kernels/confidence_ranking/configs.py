"""Rules of the decision, what stands for no token, and the kernel's tile."""

from enum import IntEnum
from typing import Final


class Rule(IntEnum):
    """Which candidates of a group are decided beside its `quota` most confident ones.

    The n-th candidate by falling confidence c (n from 1, equals by their place) is decided

    COUNT: not at all.
    THRESHOLD: where c >= bound.
    FACTOR: where c >= 1 - bound / (n + 1). c falls and the right side rises with n, so these are
        the longest prefix of which each passes (Fast-dLLM, arXiv 2505.22618, section 3.3).
    ENTROPY_BOUND: where c is a negative entropy, and the entropies of the n - 1 before it add up to
        no more than the bound: the sum of the first n minus their maximum, which is the n-th
        (EB-Sampler, arXiv 2505.24857).
    ENTROPY_THRESHOLD: where c is a negative entropy, and the entropy is below the bound.

    With every rule but COUNT a candidate whose token is the mask token is passed over.
    """

    COUNT = 0
    THRESHOLD = 1
    FACTOR = 2
    ENTROPY_BOUND = 3
    ENTROPY_THRESHOLD = 4


UNDECIDED: Final = -1
"""In place of a token: the candidate stays masked."""

NOT_FINITE: Final = -2
"""In place of a token: the confidence is not a number, so the logits were not finite."""

ENTROPY_UNIT: Final = 2.0**-40
"""Entropies are added up in multiples of this, in int64: the sum depends on no order. Those of
65,536 candidates with a vocabulary of 2^18 stay below 2^61."""

BLOCK_CANDIDATES: Final = 32
BLOCK_OTHERS: Final = 256
NUM_WARPS: Final = 4
MAX_KERNEL_CANDIDATES: Final = 8192
"""More are sorted: the kernel compares each with all others of its group."""
