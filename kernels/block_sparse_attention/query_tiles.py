"""Which query blocks one launch of the block-sparse attention covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vllm_sparsed.kernels.dimensions import BLOCK_SIZES

GROUP_TOKENS: Final = 64
"""Queries that a group of neighbouring rows covers: what a warpgroup multiplies at once."""


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """The pattern rows (query blocks) of all sparse requests of an engine step.

    Built once per engine step and shared by all layers. All requests have the same block size.

    Attributes:
        seq_start: int32 [num_rows], first packed token of the row's request.
        seq_len: int32 [num_rows], tokens of the row's request.
        query_block: int32 [num_rows], index of the query block within its request.
        pattern_row: int32 [num_rows], row of the pattern store that holds the row's index lists.
        group_row: int32 [num_groups], first row of each group of neighbouring rows of one request;
            a group covers 64 queries (less at the end of a request), or one larger block.
        block_size: tokens per query and key block.
        max_seq_len: tokens of the longest request.
        min_seq_len: tokens of the shortest request.
    """

    seq_start: Tensor
    seq_len: Tensor
    query_block: Tensor
    pattern_row: Tensor
    group_row: Tensor
    block_size: int
    max_seq_len: int
    min_seq_len: int

    @property
    def num_rows(self) -> int:
        return self.pattern_row.shape[0]

    @classmethod
    def build(
        cls,
        seq_starts: Sequence[int],
        seq_lens: Sequence[int],
        pattern_rows: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device | str,
    ) -> QueryTiles:
        """Lay out the rows of all requests, with one copy from host to device.

        Args:
            seq_starts: first packed token of each request.
            seq_lens: tokens of each request, at least 1.
            pattern_rows: for each request the pattern store's row of each of its query blocks.
            block_size: 16, 32, 64 or 128.
            device: where attention runs.

        Raises:
            ValueError: lengths that do not fit together, an empty request, a negative start or
                slot, or an unsupported block size.
        """
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size}")
        if not len(seq_starts) == len(seq_lens) == len(pattern_rows):
            raise ValueError(
                "seq_starts, seq_lens and pattern_rows must have one entry per request, got "
                f"{len(seq_starts)}, {len(seq_lens)} and {len(pattern_rows)}"
            )
        if not seq_lens:
            raise ValueError("seq_lens must name at least one request")
        starts = np.asarray(seq_starts, dtype=np.int64)
        lens = np.asarray(seq_lens, dtype=np.int64)
        if lens.min() < 1:
            raise ValueError(f"seq_lens must be at least 1, got {lens.min()}")
        if starts.min() < 0:
            raise ValueError(f"seq_starts must not be negative, got {starts.min()}")
        num_blocks = -(-lens // block_size)
        for request, (slots, expected) in enumerate(zip(pattern_rows, num_blocks, strict=True)):
            if len(slots) != expected:
                raise ValueError(
                    f"pattern_rows[{request}] must have {expected} entries, one per query block, "
                    f"got {len(slots)}"
                )
        slots_of_rows = np.concatenate(
            [np.asarray(slots, dtype=np.int64) for slots in pattern_rows]
        )
        if slots_of_rows.min() < 0:
            raise ValueError(f"pattern_rows must not be negative, got {slots_of_rows.min()}")

        rows_per_group = max(1, GROUP_TOKENS // block_size)
        first_rows = np.cumsum(num_blocks) - num_blocks
        query_block = np.arange(num_blocks.sum()) - np.repeat(first_rows, num_blocks)
        columns = (
            np.repeat(starts, num_blocks),
            np.repeat(lens, num_blocks),
            query_block,
            slots_of_rows,
            np.flatnonzero(query_block % rows_per_group == 0),
        )
        packed = torch.from_numpy(np.concatenate(columns).astype(np.int32))
        device = torch.device(device)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        else:
            packed = packed.to(device)
        seq_start, seq_len, blocks, pattern_row, group_row = packed.split([len(c) for c in columns])
        return cls(
            seq_start=seq_start,
            seq_len=seq_len,
            query_block=blocks,
            pattern_row=pattern_row,
            group_row=group_row,
            block_size=block_size,
            max_seq_len=int(lens.max()),
            min_seq_len=int(lens.min()),
        )
