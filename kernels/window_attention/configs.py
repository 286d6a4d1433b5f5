"""Launch configurations of the window attention by head_dim, dtype and chip: no autotuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from vllm_sparsed.kernels.dimensions import known_capability

COMBINED_ROWS: Final = 16
"""Rows that one program of the combination takes."""


@dataclass(frozen=True, slots=True)
class TileConfig:
    """BLOCK_M rows by BLOCK_N keys, and how Triton runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By padded head_dim and bits per element of the queries. All of them stay within the 99 KiB of
# shared memory of 8.6 and 8.9. Windows are bound by reading keys: a tile takes all rows at once.
_MODEST: Final = {
    (16, 16): TileConfig(64, 64, 4, 3),
    (32, 16): TileConfig(64, 64, 4, 3),
    (64, 16): TileConfig(64, 64, 4, 3),
    (128, 16): TileConfig(64, 64, 8, 2),
    (256, 16): TileConfig(64, 32, 8, 2),
    (16, 32): TileConfig(64, 32, 4, 2),
    (32, 32): TileConfig(32, 32, 4, 2),
    (64, 32): TileConfig(32, 32, 8, 2),
    (128, 32): TileConfig(32, 32, 8, 2),
    (256, 32): TileConfig(16, 16, 8, 2),
}
_TABLE: Final = {
    (8, 0): _MODEST,
    (8, 6): _MODEST,
    (8, 9): _MODEST,
    (9, 0): _MODEST
    | {
        (64, 16): TileConfig(64, 64, 4, 4),
        (128, 16): TileConfig(64, 64, 4, 3),
        (256, 16): TileConfig(64, 32, 4, 3),
    },
}


@cache
def tile_config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfig:
    """The configuration for queries of this dtype; it does not depend on the batch."""
    by_shape = _TABLE[known_capability(capability)]
    return by_shape[1 << (head_dim - 1).bit_length(), dtype.itemsize * 8]


def has_fp8_conversion(capability: tuple[int, int]) -> bool:
    """Whether the chip converts e4m3 by itself; elsewhere its bits are rearranged."""
    return capability >= (8, 9)
