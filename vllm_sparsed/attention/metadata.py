"""What one forward pass tells the attention layers about its sequences."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_sparsed.attention.pages import PAGE_SIZE
from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.kernels.block_sparse_attention import QueryTiles
from vllm_sparsed.kernels.pattern_building import pattern_width
from vllm_sparsed.kernels.window_attention import Window, WindowTiles, num_tiles_bound
from vllm_sparsed.planning.crossover import FlashAttention4Range

WINDOW_ORDER: Final = 3
"""Of `SequencePhase.order`: windows come last."""


@dataclass(frozen=True, slots=True)
class SequencePhase:
    """How one sequence of the pass attends.

    A sequence without pattern settings is dense. One that builds writes its pattern in this pass,
    one that does not reads it.

    Attributes:
        canvas_len: canvas tokens at its end.
        block_size: tokens of a pattern block; 0 in a dense sequence.
        select: share of the blocks that a row keeps, rho.
        builds: whether this is step t*.
        pattern_rows: rows of the pattern store, one per query block.
        pages: of the store of keys and values, in order; empty: those of this sequence are not
            kept. The pass writes the rows that it computes.
        window: first row of those that the pass computes, and tokens of the whole sequence, whose
            other rows it reads from the pages; None: it computes all rows.
    """

    canvas_len: int
    block_size: int = 0
    select: float = 1.0
    builds: bool = False
    pattern_rows: Sequence[int] = ()
    pages: Sequence[int] = ()
    window: tuple[int, int] | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: dense, then building, then sparse sequences, these by block size, then windows,
        likewise."""
        if self.window is not None:
            return (WINDOW_ORDER, self.block_size)
        if self.block_size == 0:
            return (0, 0)
        return (1, 0) if self.builds else (2, self.block_size)


@dataclass
class DenoisingAttentionMetadata(CommonAttentionMetadata):
    """vLLM's metadata of a batch and, for the SPARSED backend, each sequence's phase.

    The sequences are ordered by `SequencePhase.order`. Other backends read vLLM's fields alone and
    attend densely.

    Attributes:
        is_padded: whether rows that belong to no sequence come last, and what depends on where the
            windows lie is to be padded too.
    """

    phases: Sequence[SequencePhase] = ()
    store: PatternStore | None = None
    is_padded: bool = False


@dataclass(frozen=True, slots=True)
class PatternBuild:
    """One sequence that builds its patterns in this pass: tokens [start, end) of the batch."""

    start: int
    end: int
    canvas_len: int
    block_size: int
    select: float
    pattern_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class FlashAttention4Sequence:
    """One sparse sequence that FlashAttention 4 attends for: tokens [start, end) of the batch.

    Attributes:
        pattern_rows: int32 [query blocks] on the device, its rows of the pattern store.
    """

    start: int
    end: int
    pattern_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class WindowGroup:
    """The windows of a pass whose patterns have one block size, or that have none.

    Attributes:
        tiles: their rows.
        block_table: int32 [windows, pages] on the device, the pages of each window's sequence.
        has_patterns: whether they read the pattern store.
    """

    tiles: WindowTiles
    block_table: torch.Tensor
    has_patterns: bool


@dataclass(frozen=True, slots=True)
class SparsedMetadata:
    """The batch as the SPARSED backend runs it: one dense span, then the sparse sequences, then the
    windows.

    Attributes:
        num_tokens: tokens of the batch.
        dense_bounds: (start, end) of each dense or building sequence, in order.
        dense_start_loc: int32 [dense sequences + 1] on the device, the same as offsets.
        max_dense_len: tokens of the longest of them.
        builds: the building ones, the last of the dense span.
        tiles: query blocks of the sparse sequences, one entry per block size, those shorter than
            a block apart.
        store: where patterns are written to and read from.
        fa4_sequences: the sparse sequences that are not in `tiles`.
        slots: int64 [tokens] on the device, where the pages keep each token's keys and values;
            None: nothing is kept.
        windows: the windows.
    """

    num_tokens: int
    dense_bounds: tuple[tuple[int, int], ...]
    dense_start_loc: torch.Tensor
    max_dense_len: int
    builds: tuple[PatternBuild, ...]
    tiles: tuple[QueryTiles, ...]
    store: PatternStore | None
    fa4_sequences: tuple[FlashAttention4Sequence, ...] = ()
    slots: torch.Tensor | None = None
    windows: tuple[WindowGroup, ...] = ()

    @property
    def num_whole(self) -> int:
        """Launches for whole sequences."""
        return len(self.dense_bounds) + len(self.tiles) + len(self.fa4_sequences)

    @property
    def num_dense_tokens(self) -> int:
        return self.dense_bounds[-1][1] if self.dense_bounds else 0


class SparsedMetadataBuilder(AttentionMetadataBuilder[SparsedMetadata]):
    """Splits a batch into its dense span and its sparse sequences.

    Attributes:
        fa4: FlashAttention 4, for the sequences for which it is chosen.
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.fa4: FlashAttention4Range | None = None
        self._num_heads: int = vllm_config.model_config.get_num_attention_heads(
            vllm_config.parallel_config
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> SparsedMetadata:
        """Build the metadata of one batch, shared by all layers.

        Raises:
            ValueError: the sequences are not in the order of their phases.
        """
        offsets: list[int] = common_attn_metadata.query_start_loc_cpu.tolist()
        bounds = list(pairwise(offsets))
        phases: Sequence[SequencePhase] = getattr(common_attn_metadata, "phases", ())
        if not phases:
            phases = [SequencePhase(canvas_len=0)] * len(bounds)
        if any(a.order > b.order for a, b in pairwise(phases)):
            raise ValueError("phases: dense, building and sparse sequences must come in this order")

        num_dense = sum(1 for phase in phases if phase.order < (2, 0))
        num_whole = sum(1 for phase in phases if phase.window is None)
        sequences = list(zip(bounds, phases, strict=True))
        sparse = sequences[num_dense:num_whole]
        by_fa4 = [self._by_fa4(start, end, phase) for (start, end), phase in sparse]
        builds = tuple(
            PatternBuild(
                start=start,
                end=end,
                canvas_len=phase.canvas_len,
                block_size=phase.block_size,
                select=phase.select,
                pattern_rows=torch.tensor(
                    phase.pattern_rows, dtype=torch.int32, device=self.device
                ),
            )
            for (start, end), phase in zip(bounds, phases, strict=True)
            if phase.builds
        )
        return SparsedMetadata(
            num_tokens=common_attn_metadata.num_actual_tokens,
            dense_bounds=tuple(bounds[:num_dense]),
            dense_start_loc=common_attn_metadata.query_start_loc[: num_dense + 1],
            max_dense_len=max((end - start for start, end in bounds[:num_dense]), default=0),
            builds=builds,
            tiles=self._tiles([x for x, other in zip(sparse, by_fa4, strict=True) if not other]),
            store=getattr(common_attn_metadata, "store", None),
            fa4_sequences=tuple(
                FlashAttention4Sequence(
                    start, end, to_device(np.array(phase.pattern_rows, dtype=np.int32), self.device)
                )
                for ((start, end), phase), other in zip(sparse, by_fa4, strict=True)
                if other
            ),
            slots=common_attn_metadata.slot_mapping if any(p.pages for p in phases) else None,
            windows=self._windows(
                sequences[num_whole:], getattr(common_attn_metadata, "is_padded", False)
            ),
        )

    def _by_fa4(self, start: int, end: int, phase: SequencePhase) -> bool:
        return self.fa4 is not None and self.fa4.chosen(end - start, phase.block_size)

    def _tiles(
        self, sequences: Sequence[tuple[tuple[int, int], SequencePhase]]
    ) -> tuple[QueryTiles, ...]:
        # The shortest sequence of a launch decides which kernel serves it; what is shorter than a
        # block must not choose for others, whose rounding would depend on it.
        groups: dict[tuple[int, bool], list[tuple[int, int, Sequence[int]]]] = {}
        for (start, end), phase in sequences:
            key = (phase.block_size, end - start < phase.block_size)
            groups.setdefault(key, []).append((start, end - start, phase.pattern_rows))
        return tuple(
            QueryTiles.build(
                [start for start, _, _ in group],
                [length for _, length, _ in group],
                [rows for _, _, rows in group],
                block_size,
                self.device,
            )
            for (block_size, _), group in groups.items()
        )

    def _windows(
        self, sequences: Sequence[tuple[tuple[int, int], SequencePhase]], is_padded: bool
    ) -> tuple[WindowGroup, ...]:
        groups: dict[int, list[tuple[tuple[int, int], SequencePhase]]] = {}
        for bounds, phase in sequences:
            groups.setdefault(phase.block_size, []).append((bounds, phase))
        return tuple(self._window_group(size, group, is_padded) for size, group in groups.items())

    def _window_group(
        self,
        block_size: int,
        group: Sequence[tuple[tuple[int, int], SequencePhase]],
        is_padded: bool,
    ) -> WindowGroup:
        windows = []
        shape = len(group), max(len(phase.pages) for _, phase in group)
        if is_padded:
            shape = _power_of_two(shape[0]), _power_of_two(shape[1])
        table = np.zeros(shape, dtype=np.int32)
        for i, ((start, end), phase) in enumerate(group):
            assert phase.window is not None
            first, seq_len = phase.window
            table[i, : len(phase.pages)] = phase.pages
            rows: Sequence[int] = ()
            most = 0
            if block_size:
                last = first + end - start - 1
                rows = phase.pattern_rows[first // block_size : last // block_size + 1]
                most = pattern_width(
                    -(-seq_len // block_size), -(-phase.canvas_len // block_size), phase.select
                )
            windows.append(Window(start, end - start, first, seq_len, i, rows, most))
        tile_size = block_size or PAGE_SIZE
        num_tiles = None
        if is_padded:
            # However the windows lie over the query blocks.
            num_tiles = _power_of_two(
                sum(num_tiles_bound(end - start, tile_size) for (start, end), _ in group)
            )
        tiles = WindowTiles.build(
            windows, tile_size, self._num_heads, self.device, num_tiles=num_tiles
        )
        if is_padded:
            tiles = replace(tiles, max_splits=_power_of_two(tiles.max_splits))
        return WindowGroup(
            tiles,
            to_device(table, self.device),
            has_patterns=block_size > 0,
        )


def _power_of_two(number: int) -> int:
    """The least that is no smaller."""
    return 1 << (number - 1).bit_length()
