"""The memory that holds the block patterns of all running requests."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

_INT16_BLOCKS = 32767


@dataclass(frozen=True, slots=True)
class PatternStoreSize:
    """Dimensions of a pattern store.

    Attributes:
        num_rows: pattern rows (query blocks) of a full batch; one request may take them all.
        width: most key blocks that one row of one query head may keep.
    """

    num_rows: int
    width: int

    @property
    def total_rows(self) -> int:
        """Rows of the store: those of a full batch twice, so that a long request, which holds its
        rows through many turns of others, leaves short ones theirs."""
        return 2 * self.num_rows

    @property
    def max_short_rows(self) -> int:
        """Most rows of a request that takes them from the half for short requests: four or more of
        these always fit."""
        return self.num_rows // 4

    def num_bytes(self, num_layers: int, num_heads: int) -> int:
        """Bytes of the store of one worker: int16 index lists and int32 counts."""
        return num_layers * self.total_rows * num_heads * (2 * self.width + 4)


class PatternStore:
    """Index lists of kept key blocks, per layer, pattern row and query head (SparseD, section 4).

    Allocated once at start. A request takes one row per query block of each of its sequences when
    its patterns are built and gives them back when it ends, is aborted or preempted. Rows need not
    be contiguous, so there is no fragmentation: what the scheduler admitted always fits.

    Attributes:
        indices: int16 [layers, rows, heads, width]; ascending key-block indices.
        counts: int32 [layers, rows, heads]; how many of the indices are valid.
    """

    def __init__(
        self, size: PatternStoreSize, num_layers: int, num_heads: int, device: torch.device
    ) -> None:
        if size.width > _INT16_BLOCKS:
            raise ValueError(
                f"{size.width} key blocks in a row exceed int16; use a larger sparsed.block_size"
            )
        self.size = size
        self.indices = torch.zeros(
            (num_layers, size.total_rows, num_heads, size.width), dtype=torch.int16, device=device
        )
        self.counts = torch.zeros(
            (num_layers, size.total_rows, num_heads), dtype=torch.int32, device=device
        )
        self._free = list(range(size.total_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free)

    @property
    def num_bytes(self) -> int:
        return self.indices.nbytes + self.counts.nbytes

    def allocate(self, num_rows: int) -> list[int]:
        """Take rows for one sequence.

        Raises:
            RuntimeError: fewer are free, which the scheduler's admission rules out.
        """
        if num_rows > len(self._free):
            raise RuntimeError(f"pattern store: {num_rows} rows asked, {len(self._free)} free")
        taken = self._free[-num_rows:]
        del self._free[-num_rows:]
        return taken

    def release(self, rows: Iterable[int]) -> None:
        """Give rows back; their content is overwritten before it is read again."""
        self._free.extend(rows)
