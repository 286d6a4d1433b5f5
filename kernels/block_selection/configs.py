"""Widths of the selection kernel: a row is padded to one of them, so few variants are compiled."""

from types import MappingProxyType
from typing import Final

# Padded number of columns -> warps; a row of up to 512 needs no exchange between warps.
TABLE: Final = MappingProxyType({128: 1, 512: 1, 2048: 4, 8192: 8})
MAX_BLOCKS: Final = max(TABLE)


def padded_width(num_blocks: int) -> int:
    """The smallest width of the table that holds so many columns; at most MAX_BLOCKS."""
    return min(width for width in TABLE if width >= num_blocks)
