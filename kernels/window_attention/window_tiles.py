"""Which rows one launch of the window attention covers, and how each row's keys are split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vllm_sparsed.kernels.dimensions import BLOCK_SIZES

MAX_SPLITS: Final = 32
"""Parts that the keys of one row may be cut into, each by a program of its own."""

PROGRAMS: Final = 264
"""Programs that the splits of ONE window aim at: two for each of the 132 multiprocessors of an
H100. Constant, so that a result depends neither on the chip nor on what else is in the batch."""

SPLIT_UNIT: Final = 128
"""Keys of a split are a multiple of this."""

LEAST_SPLIT_KEYS: Final = 256

TILE_ROWS: Final = 64
"""Most rows of a tile."""


class Field(IntEnum):
    """Rows of `WindowTiles.table`.

    FIRST_ROW: the tile's first row among the packed ones. NUM_ROWS: of the tile; 0 in a tile that
    only pads. SEQ_LEN: tokens of its sequence. SEQUENCE: row of the block table. PATTERN_ROW: row
    of the pattern store, -1 without a pattern. FIRST_TOUCHED, NUM_TOUCHED: key blocks that are kept
    beside those on the list. SPLIT_KEYS, NUM_SPLITS: how the kept keys are cut.
    """

    FIRST_ROW = 0
    NUM_ROWS = 1
    SEQ_LEN = 2
    SEQUENCE = 3
    PATTERN_ROW = 4
    FIRST_TOUCHED = 5
    NUM_TOUCHED = 6
    SPLIT_KEYS = 7
    NUM_SPLITS = 8


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring rows of one sequence that are computed in this pass.

    Attributes:
        first_row: the window's first row among the packed ones.
        num_rows: at least 1.
        first_position: position of its first row in the sequence.
        seq_len: tokens of the whole sequence, window included.
        sequence: the sequence's row of the block table.
        pattern_rows: rows of the pattern store for the query blocks that the window touches, in
            order. Empty: the window attends to all keys.
        max_listed: most key blocks on one of these lists. It decides how the keys are split, so it
            must follow from the request alone. 0: any number.
    """

    first_row: int
    num_rows: int
    first_position: int
    seq_len: int
    sequence: int
    pattern_rows: Sequence[int] = ()
    max_listed: int = 0


@dataclass(frozen=True, slots=True)
class WindowTiles:
    """The rows of all windows of a pass that have one block size, cut into tiles.

    A tile has at most TILE_ROWS rows; with a pattern it lies within one query block. Built once per
    pass and shared by all layers. How a window is cut and split follows from the window and the
    number of heads alone, so its result is the same, bit for bit, in any batch. In a CUDA graph
    `table` is what a replay overwrites (`table.copy_(other.table)`), with `num_tiles` and
    `max_splits` fixed.

    Attributes:
        table: int32 [fields, num_tiles], see `Field`.
        block_size: tokens of a key block; tiles without a pattern fit any.
        max_splits: no tile has more splits.
        has_patterns: whether any tile has one.
    """

    table: Tensor
    block_size: int
    max_splits: int
    has_patterns: bool

    @property
    def num_tiles(self) -> int:
        return self.table.shape[1]

    @classmethod
    def build(
        cls,
        windows: Sequence[Window],
        block_size: int,
        num_heads: int,
        device: torch.device | str,
        *,
        num_tiles: int | None = None,
        max_splits: int | None = None,
    ) -> WindowTiles:
        """Cut the windows into tiles, with one copy from host to device.

        Args:
            windows: of any sequences; no two share a row.
            block_size: 16, 32, 64 or 128; of the patterns of all windows that have one.
            num_heads: query heads of a layer on this device.
            device: where attention runs.
            num_tiles: pad to so many tiles, for a CUDA graph. None: as many as there are.
            max_splits: of the graph. None: the most that a tile has.

        Raises:
            ValueError: a window that does not fit its sequence or its pattern rows, an unsupported
                block size, or more tiles or splits than the graph has.
        """
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        columns = []
        for i, window in enumerate(windows):
            _check(window, i, block_size)
            columns.extend(_tiles_of(window, block_size, num_heads))
        splits = max((column[Field.NUM_SPLITS] for column in columns), default=1)
        if num_tiles is not None and len(columns) > num_tiles:
            raise ValueError(f"num_tiles must be at least {len(columns)}, got {num_tiles}")
        if max_splits is not None and splits > max_splits:
            raise ValueError(f"max_splits must be at least {splits}, got {max_splits}")
        table = np.zeros((len(Field), num_tiles or len(columns)), dtype=np.int32)
        for i, column in enumerate(columns):
            table[:, i] = column
        packed = torch.from_numpy(table)
        device = torch.device(device)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        else:
            packed = packed.to(device)
        has_patterns = any(window.pattern_rows for window in windows)
        return cls(packed, block_size, max_splits or splits, has_patterns)


def num_tiles_bound(num_rows: int, block_size: int) -> int:
    """Most tiles that a window of so many rows has, wherever it lies and with or without pattern.

    For the size of a CUDA graph.
    """
    tile_rows = min(block_size, TILE_ROWS)
    return (num_rows + 2 * (tile_rows - 1)) // tile_rows


def split(num_keys: int, num_programs: int) -> tuple[int, int]:
    """How to cut the keys of each row of a window.

    Args:
        num_keys: most keys that a row attends to.
        num_programs: the window's tiles times heads, each a program without splits.

    Returns:
        Keys of a split, and the number of splits.
    """
    wanted = min(max(PROGRAMS // num_programs, 1), MAX_SPLITS)
    keys = max(-(-num_keys // wanted), LEAST_SPLIT_KEYS)
    keys = -(-keys // SPLIT_UNIT) * SPLIT_UNIT
    return keys, -(-num_keys // keys)


def _check(window: Window, i: int, block_size: int) -> None:
    if window.num_rows < 1:
        raise ValueError(f"windows[{i}].num_rows must be at least 1, got {window.num_rows}")
    for name in ("first_row", "first_position", "sequence", "max_listed"):
        if getattr(window, name) < 0:
            raise ValueError(
                f"windows[{i}].{name} must not be negative, got {getattr(window, name)}"
            )
    end = window.first_position + window.num_rows
    if end > window.seq_len:
        raise ValueError(
            f"windows[{i}] ends at position {end}, behind its sequence of {window.seq_len} tokens"
        )
    if window.pattern_rows:
        touched = (end - 1) // block_size - window.first_position // block_size + 1
        if len(window.pattern_rows) != touched:
            raise ValueError(
                f"windows[{i}].pattern_rows must have {touched} entries, one per query block that "
                f"the window touches, got {len(window.pattern_rows)}"
            )
        if min(window.pattern_rows) < 0:
            raise ValueError(
                f"windows[{i}].pattern_rows must not be negative, got {min(window.pattern_rows)}"
            )


def _tiles_of(window: Window, block_size: int, num_heads: int) -> list[tuple[int, ...]]:
    """Columns of the table, fields in their order."""
    num_blocks = -(-window.seq_len // block_size)
    first_block = window.first_position // block_size
    num_touched = (window.first_position + window.num_rows - 1) // block_size - first_block + 1
    parts = list(_parts(window, block_size))
    if window.pattern_rows:
        kept_blocks = min(num_blocks, (window.max_listed or num_blocks) + num_touched)
    else:
        first_block, num_touched, kept_blocks = 0, num_blocks, num_blocks
    num_keys = min(window.seq_len, kept_blocks * block_size)
    keys, splits = split(num_keys, len(parts) * num_heads)
    return [
        (
            window.first_row + first,
            num_rows,
            window.seq_len,
            window.sequence,
            pattern_row,
            first_block,
            num_touched,
            keys,
            splits,
        )
        for first, num_rows, pattern_row in parts
    ]


def _parts(window: Window, block_size: int) -> Iterator[tuple[int, int, int]]:
    """First row within the window, number of rows and pattern row of each tile."""
    if not window.pattern_rows:
        for first in range(0, window.num_rows, TILE_ROWS):
            yield first, min(TILE_ROWS, window.num_rows - first), -1
        return
    start, end = window.first_position, window.first_position + window.num_rows
    first_block = start // block_size
    for i, pattern_row in enumerate(window.pattern_rows):
        block_start = max(start, (first_block + i) * block_size)
        block_end = min(end, (first_block + i + 1) * block_size)
        for first in range(block_start, block_end, TILE_ROWS):
            yield first - start, min(TILE_ROWS, block_end - first), pattern_row
