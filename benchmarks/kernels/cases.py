"""Which shapes the attention benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch

SHAPES: Final = {
    "llada": (32, 32),
    "dream": (28, 4),
    "illada": (32, 8),
    "llada-moe": (16, 16),
    "tiny": (4, 2),
}
"""Query and key heads of LLaDA-8B and Dream-7B, and of a shape for trying out."""

LENGTHS: Final = tuple(1024 * 2**i for i in range(8))
"""1k to 128k tokens."""

MIXED: Final = (1024, 2048, 4096, 4096, 8192, 16384)
"""A batch of requests of different lengths; multiples of every block size, so that a peer without
variable lengths can run it as one sequence whose pattern keeps the requests apart."""


@dataclass(frozen=True, slots=True)
class Case:
    """One attention layer over a batch.

    Attributes:
        shape: a key of SHAPES.
        lengths: tokens of each request, multiples of the block size.
        block_size: tokens of a pattern block.
        select: share of its key blocks that each row keeps, before rounding.
        head_dim: elements of a head.
        dtype: of queries, keys and values.
    """

    shape: str
    lengths: tuple[int, ...]
    block_size: int = 128
    select: float = 0.3
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_heads(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def num_kv_heads(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def label(self) -> str:
        """Name of the case, for the command line and for plots."""
        single = len(self.lengths) == 1
        length = _short(self.lengths[0]) if single else f"mixed{len(self.lengths)}"
        parts = [self.shape, length, f"b{self.block_size}", f"{self.select:.0%}"]
        if self.head_dim != 128:
            parts.append(f"d{self.head_dim}")
        if self.dtype not in (torch.bfloat16,):
            parts.append(str(self.dtype).removeprefix("torch."))
        return "-".join(parts)

    @property
    def dense_key(self) -> tuple[object, ...]:
        """What dense attention depends on: its time is the same for all patterns."""
        return (self.shape, self.lengths, self.head_dim, self.dtype)


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _by_length(blocks: tuple[int, ...], lengths: tuple[int, ...]) -> list[Case]:
    return [
        Case(shape, (length,), block)
        for block in blocks
        for length in lengths
        for shape in ("llada", "dream")
    ]


def _by_share(length: int, shares: tuple[float, ...], block_size: int = 128) -> list[Case]:
    return [Case("llada", (length,), block_size, share) for share in shares]


_TENTHS: Final = tuple(i / 10 for i in range(1, 11))
_FEW_SHARES: Final = (0.1, 0.5, 1.0)
_MAIN_LENGTHS: Final = (65536, 16384, 4096)
_SMALL_BLOCKS: Final = (64, 32)

USUAL: Final = (
    *_by_length((128,), _MAIN_LENGTHS),
    *_by_length(_SMALL_BLOCKS, _MAIN_LENGTHS),
    *(Case(shape, MIXED) for shape in ("llada", "dream")),
    *_by_share(16384, _TENTHS),
    *_by_length((128,), (1024, 2048, 8192, 32768)),
    *(case for block in _SMALL_BLOCKS for case in _by_share(16384, _FEW_SHARES, block)),
    *_by_share(65536, _FEW_SHARES),
    *_by_length((128,), (131072,)),
)
"""In order of importance: a time budget cuts from the end."""

FULL: Final = (
    *USUAL,
    *_by_length((128, *_SMALL_BLOCKS), LENGTHS),
    *_by_share(4096, _TENTHS),
    *_by_share(65536, _TENTHS),
    *(case for block in _SMALL_BLOCKS for case in _by_share(4096, _FEW_SHARES, block)),
    *(Case(shape, MIXED, block) for shape in ("llada", "dream") for block in _SMALL_BLOCKS),
    Case("llada", (4096,), 16),
    *(Case("llada", (16384,), head_dim=dim) for dim in (64, 96, 256)),
    Case("llada", (4096,), dtype=torch.float32),
)

_TINY: Final[dict[str, Any]] = {"head_dim": 32, "dtype": torch.float32}

SMALL: Final = (
    Case("tiny", (256,), 32, **_TINY),
    Case("tiny", (256,), 64, 0.5, **_TINY),
    Case("tiny", (128, 384), 64, **_TINY),
)
"""For a CPU."""


def unique(cases: tuple[Case, ...]) -> list[Case]:
    """Each case once, in order."""
    return list(dict.fromkeys(cases))
