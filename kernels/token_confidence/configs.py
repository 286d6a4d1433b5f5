"""Which statistic the kernel computes, and its tile."""

from enum import IntEnum
from typing import Final


class Statistic(IntEnum):
    """What is computed of softmax(logits) beside the candidate.

    PROBABILITY: of the candidate. MARGIN: largest minus second largest probability.
    NEGATIVE_ENTROPY: in nats, with 0 log 0 = 0. Each is NaN where a logit is NaN or infinite.
    """

    PROBABILITY = 1
    MARGIN = 2
    NEGATIVE_ENTROPY = 3


BLOCK: Final = 8192
"""Columns of the vocabulary that a program reads at once."""
DRAW_BLOCK: Final = 2048
"""The same with random numbers, which take registers."""
NUM_WARPS: Final = 8
