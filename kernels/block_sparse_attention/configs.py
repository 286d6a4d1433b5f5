"""Launch configurations by head_dim, dtype, block size and compute capability: no autotuning."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import torch

from vllm_sparsed.kernels.devices import FLOATS_16_BIT
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES, known_capability


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile of the portable kernel: BLOCK_M queries by BLOCK_N keys, and how Triton runs it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By padded head_dim and bits per element, then for blocks of 16, 32, 64 and 128 tokens. Small
# blocks leave few queries per tile, which then gathers the keys of several blocks.
_TINY: Final = (
    TileConfig(16, 128, 4, 2),
    TileConfig(32, 128, 4, 2),
    TileConfig(64, 64, 4, 2),
    TileConfig(128, 64, 4, 2),
)
_TINY_32BIT: Final = (
    TileConfig(16, 32, 4, 2),
    TileConfig(32, 32, 4, 2),
    TileConfig(64, 32, 4, 2),
    TileConfig(64, 32, 4, 2),
)
_SMALL_32BIT: Final = (TileConfig(16, 32, 4, 2), *(TileConfig(32, 32, 8, 2),) * 3)
# Compute capability 8.x: no spills, and within the 99 KiB of shared memory of 8.6 and 8.9.
_AMPERE: Final = {
    (16, 16): _TINY,
    (32, 16): _TINY,
    (64, 16): (*_TINY[:2], TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3)),
    (128, 16): (*_TINY[:2], TileConfig(64, 32, 8, 3), TileConfig(128, 32, 8, 3)),
    (256, 16): (
        TileConfig(16, 32, 4, 2),
        TileConfig(32, 32, 4, 2),
        TileConfig(64, 32, 4, 2),
        TileConfig(64, 32, 4, 2),
    ),
    (16, 32): _TINY_32BIT,
    (32, 32): _TINY_32BIT,
    (64, 32): _SMALL_32BIT,
    (128, 32): _SMALL_32BIT,
    (256, 32): (TileConfig(16, 16, 8, 2),) * 4,
}
_TABLE: Final = {
    (8, 0): _AMPERE,
    (8, 6): _AMPERE,
    (8, 9): _AMPERE,
    (9, 0): _AMPERE
    | {
        (64, 16): (*_TINY[:2], TileConfig(64, 64, 4, 3), TileConfig(128, 64, 4, 3)),
        (128, 16): (*_TINY[:2], TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3)),
        (256, 16): (*_AMPERE[256, 16][:3], TileConfig(128, 64, 8, 2)),
    },
}


@cache
def tile_config(
    head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
) -> TileConfig:
    """The portable kernel's configuration; a tile never spans two query blocks."""
    by_shape = _TABLE[known_capability(capability)]
    by_block = by_shape[1 << (head_dim - 1).bit_length(), dtype.itemsize * 8]
    return by_block[BLOCK_SIZES.index(block_size)]


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How the sm_90 kernel runs.

    Attributes:
        stages: key (and value) tiles that the rings in shared memory hold.
        max_registers: register cap per thread at entry, which sets how many programs share an SM.
        consumer_registers: registers per thread of a second consumer warpgroup; unused with one.
        programs_per_sm: size of the persistent grid; 0 launches one program per tile.
    """

    stages: int
    max_registers: int
    consumer_registers: int
    programs_per_sm: int


_HOPPER: Final = {
    (128, 128): HopperConfig(2, 168, 240, 1),
    (64, 128): HopperConfig(2, 168, 240, 1),
    (128, 64): HopperConfig(2, 128, 24, 2),
    (64, 64): HopperConfig(3, 128, 24, 2),
    (128, 32): HopperConfig(3, 128, 24, 2),
    (64, 32): HopperConfig(3, 128, 24, 2),
}
"""By (head_dim, block_size)."""


def hopper_config(
    head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
) -> HopperConfig | None:
    """Configuration of the sm_90 kernel, or None where the portable kernel has to serve."""
    if capability != (9, 0) or dtype not in FLOATS_16_BIT:
        return None
    return _HOPPER.get((head_dim, block_size))
