"""The kernel's tile, and how finely it searches."""

from typing import Final

BLOCK: Final = 2048
NUM_WARPS: Final = 8
WAYS: Final = 8
"""Parts that a pass divides what is left of the search into: 11 passes for 32 bits."""
