"""Which shapes the attention benchmark runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

SHAPES: Final = {"llada": (32, 32), "dream": (28, 4), "tiny": (4, 2)}
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


def _blocks_and_lengths(
    lengths: tuple[int, ...], blocks: tuple[int, ...] = (128, 64, 32)
) -> list[Case]:
    return [
        Case(shape, (length,), block)
        for block in blocks
        for length in lengths
        for shape in ("llada", "dream")
    ]


def _density_sweep(length: int, shares: tuple[float, ...]) -> list[Case]:
    return [Case("llada", (length,), select=share) for share in shares]


QUICK: Final = (
    *_blocks_and_lengths((4096, 16384, 65536)),
    *_density_sweep(16384, (0.1, 0.2, 0.5, 0.7, 1.0)),
    Case("llada", MIXED),
)

_TENTHS: Final = tuple(i / 10 for i in range(1, 11))

FULL: Final = (
    *_blocks_and_lengths(LENGTHS),
    *(case for n in (4096, 16384, 65536) for case in _density_sweep(n, _TENTHS)),
    *(
        Case("llada", (length,), block, select)
        for length in (4096, 16384)
        for block in (64, 32)
        for select in (0.1, 0.5, 1.0)
    ),
    *(Case(shape, MIXED, block) for shape in ("llada", "dream") for block in (128, 64, 32)),
    Case("llada", (4096,), 16),
    *(Case("llada", (16384,), head_dim=dim) for dim in (64, 96, 256)),
    Case("llada", (4096,), dtype=torch.float32),
)

_TINY: Final = {"head_dim": 32, "dtype": torch.float32}

SMALL: Final = (
    Case("tiny", (256,), 32, **_TINY),  # type: ignore[arg-type]
    Case("tiny", (256,), 64, 0.5, **_TINY),  # type: ignore[arg-type]
    Case("tiny", (128, 384), 64, **_TINY),  # type: ignore[arg-type]
)
"""For a CPU."""


def unique(cases: tuple[Case, ...]) -> list[Case]:
    """Each case once, in order."""
    return list(dict.fromkeys(cases))
