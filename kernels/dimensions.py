"""What the attention kernels are made for. Imports no PyTorch: option checks read it too."""

from __future__ import annotations

from typing import Final

HEAD_DIMS: Final = (16, 32, 64, 80, 96, 128, 256)
BLOCK_SIZES: Final = (16, 32, 64, 128)
"""Tokens of a pattern block."""

CAPABILITIES: Final = ((8, 0), (8, 6), (8, 9), (9, 0))
"""Compute capabilities with configurations of their own."""

_MOST_MODEST: Final = (8, 6)


def known_capability(capability: tuple[int, int]) -> tuple[int, int]:
    """The entry of CAPABILITIES that serves a chip: its own or the next below of its generation.

    Chips of other generations take that of 8.6, whose 99 KiB of shared memory all of them have.
    """
    of_generation = [c for c in CAPABILITIES if c[0] == capability[0] and c <= capability]
    return max(of_generation, default=_MOST_MODEST)
