"""Tile configurations of the block importance kernels: a table, nothing is tuned when serving."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch

from vllm_sparsed.kernels.devices import FLOATS
from vllm_sparsed.kernels.dimensions import (
    BLOCK_SIZES,
    CAPABILITIES,
    HEAD_DIMS,
    known_capability,
)


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Tile of one program. `block_m` is a multiple of the pattern's block size."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # Tensor memory accelerator: loads through descriptors (compute capability 9.0 and up).
    tma: bool = False
    # Head dimensions per product, dividing head_dim; 0: all, with the query tile kept on chip.
    chunk: int = 0
    # Registers per thread, so that several programs fit a multiprocessor; None: no limit.
    maxnreg: int | None = None


def _choose(
    head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
) -> TileConfig:
    if dtype == torch.float32:
        return TileConfig(128, 32, 8, 1, chunk=16)
    if capability >= (9, 0):
        if head_dim == 128:
            # Registers are limited so that three programs share a multiprocessor: one program's
            # products run beside another's exponentials.
            return TileConfig(128, 64, 8, 1 if block_size == 128 else 2, tma=True, maxnreg=80)
        if head_dim < 128:
            return TileConfig(128, 128, 4, 2, tma=head_dim == 64)
        return TileConfig(128, 64, 8, 2, tma=True)
    if head_dim <= 64:
        return TileConfig(128, 64, 4, 3)
    if head_dim <= 128:
        return TileConfig(128, 64, 8, 2)
    if capability == (8, 0):
        return TileConfig(128, 32, 8, 2)
    # Not even the query tile fits into 99 KiB of shared memory beside the keys.
    return TileConfig(128, 64, 8, 1, chunk=64)


TABLE: Final = MappingProxyType(
    {
        (head_dim, dtype, block_size, capability): _choose(head_dim, dtype, block_size, capability)
        for head_dim in HEAD_DIMS
        for dtype in FLOATS
        for block_size in BLOCK_SIZES
        for capability in CAPABILITIES
    }
)


def tile_config(
    head_dim: int, dtype: torch.dtype, block_size: int, capability: tuple[int, int]
) -> TileConfig:
    """The table's entry for a chip of this compute capability (8.0 and up)."""
    return TABLE[head_dim, dtype, block_size, known_capability(capability)]
