"""Puts a setting's patterns and phases into a running engine, in place of SparseD's.

The functions run in a worker, through `collective_rpc`. A pattern is the attribute `build_pattern`
of every layer's implementation. Where the steps differ in which patterns are built, the model
runner's packer marks the sequences and an implementation of its own follows the marks.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionLayer, AttentionType

from benchmarks.quality.builders import BUILDERS
from benchmarks.quality.settings import DENSE, Setting
from vllm_sparsed.attention.implementation import SparsedAttentionImpl
from vllm_sparsed.attention.metadata import PatternBuild, SparsedMetadata
from vllm_sparsed.kernels.block_sparse_attention import QueryTiles
from vllm_sparsed.kernels.pattern_building import pattern_width
from vllm_sparsed.worker.packing import BatchPacker, PackedBatch, PackedSequence


@dataclass(frozen=True, slots=True)
class FreshMetadata(SparsedMetadata):
    """A batch in which sparse sequences build the patterns that they use in the same pass."""

    fresh: tuple[PatternBuild, ...] = ()


class FreshPatternImpl(SparsedAttentionImpl):
    """Builds the patterns of the marked sequences, then attends."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparsedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As that of the base class."""
        if isinstance(attn_metadata, FreshMetadata) and attn_metadata.store is not None:
            store, index = attn_metadata.store, layer.layer_index
            for build in attn_metadata.fresh:
                self.build_pattern(
                    query[build.start : build.end],
                    key[build.start : build.end],
                    canvas_len=build.canvas_len,
                    block_size=build.block_size,
                    select=build.select,
                    scale=self.scale,
                    lse=None,
                    pattern_rows=build.pattern_rows,
                    indices=store.indices[index],
                    counts=store.counts[index],
                )
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )


class _FreshPacker(BatchPacker, ABC):
    """Turns the packed batch's metadata into one with marks, and keeps it while the batch stays."""

    _plain: PackedBatch | None = None
    _marked: PackedBatch

    def _mark(self, batch: PackedBatch) -> PackedBatch:
        if batch is not self._plain:
            metadata = next(iter(batch.attention.values()))
            self._plain = batch
            marked = self._marked_metadata(batch, metadata)
            self._marked = replace(batch, attention=dict.fromkeys(batch.attention, marked))
        return self._marked

    @abstractmethod
    def _marked_metadata(self, batch: PackedBatch, metadata: SparsedMetadata) -> FreshMetadata:
        """Say which sequences build in this pass the patterns that they use."""


class EveryStepPacker(_FreshPacker):
    """Every sequence builds its pattern anew in every sparse step."""

    def pack(self, sequences: Sequence[PackedSequence]) -> PackedBatch:
        return self._mark(super().pack(sequences))

    def _marked_metadata(self, batch: PackedBatch, metadata: SparsedMetadata) -> FreshMetadata:
        fresh = []
        for state, index in batch.sequences:
            phase, start = state.phase(index), batch.starts[state.request_id, index]
            if phase.block_size and not phase.builds:
                slots = torch.tensor(phase.pattern_rows, dtype=torch.int32, device=self._device)
                fresh.append(
                    PatternBuild(
                        start=start,
                        end=start + state.plan.seq_len,
                        canvas_len=phase.canvas_len,
                        block_size=phase.block_size,
                        select=phase.select,
                        pattern_rows=slots,
                    )
                )
        return _fresh(metadata, tuple(fresh))


class FromStartPacker(_FreshPacker):
    """Every sequence builds its pattern in step 0 and uses it from there on."""

    def pack(self, sequences: Sequence[PackedSequence]) -> PackedBatch:
        assert self._store is not None
        for state, index in sequences:
            if state.step == 0 and index == 0 and state.plan.pattern_step > 0:
                rows = state.plan.num_pattern_rows // state.plan.num_sequences
                state.pattern_rows = [
                    self._store.allocate(rows) for _ in range(state.plan.num_sequences)
                ]
                state.plan = replace(state.plan, pattern_step=0)
        return self._mark(super().pack(sequences))

    def _marked_metadata(self, batch: PackedBatch, metadata: SparsedMetadata) -> FreshMetadata:
        if not metadata.builds:
            return _fresh(metadata, ())
        num_dense = len(metadata.dense_bounds) - len(metadata.builds)
        building = [s for s in batch.sequences if s[0].phase(s[1]).builds]
        tiles = QueryTiles.build(
            [build.start for build in metadata.builds],
            [build.end - build.start for build in metadata.builds],
            [state.pattern_rows[index] for state, index in building],
            metadata.builds[0].block_size,
            self._device,
        )
        dense = metadata.dense_bounds[:num_dense]
        sparse = replace(
            metadata,
            dense_bounds=dense,
            dense_start_loc=metadata.dense_start_loc[: num_dense + 1],
            max_dense_len=max((end - start for start, end in dense), default=0),
            builds=(),
            tiles=(*metadata.tiles, tiles),
        )
        return _fresh(sparse, metadata.builds)


def _fresh(metadata: SparsedMetadata, fresh: tuple[PatternBuild, ...]) -> FreshMetadata:
    values = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
    return FreshMetadata(**values, fresh=fresh)


class RecordingImpl(SparsedAttentionImpl):
    """Attends densely and records the pattern that SparseD would build, in every step.

    Attributes:
        parameters: canvas_len, block_size and select of that pattern.
        recorded: bool [heads, n, n] of each pass; the batch must hold one sequence.
    """

    parameters: dict[str, Any]
    recorded: list[torch.Tensor]

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: SparsedMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As that of the base class."""
        if attn_metadata is not None:
            ((start, end),) = attn_metadata.dense_bounds
            self.recorded.append(self._pattern(query[start:end], key[start:end]))
        return super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata,
            output,
            output_scale,
            output_block_scale,
        )

    def _pattern(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block_size, canvas_len = self.parameters["block_size"], self.parameters["canvas_len"]
        num_blocks, device = -(-len(query) // block_size), query.device
        width = pattern_width(num_blocks, -(-canvas_len // block_size), self.parameters["select"])
        shape = (num_blocks, self.num_heads)
        indices = torch.zeros((*shape, width), dtype=torch.int32, device=device)
        counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self.build_pattern(
            query,
            key,
            **self.parameters,
            scale=self.scale,
            lse=None,
            pattern_rows=torch.arange(num_blocks, device=device),
            indices=indices,
            counts=counts,
        )
        return block_mask(indices, counts, num_blocks).transpose(0, 1)


def block_mask(indices: torch.Tensor, counts: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """bool [..., num_blocks] of lists int [..., width], of which the first `counts` are valid."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    # What is not valid goes to a column of its own.
    columns = torch.where(valid, indices.long(), num_blocks)
    mask = torch.zeros((*counts.shape, num_blocks + 1), dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, columns, True)[..., :num_blocks]


def install(worker: Any, setting: Setting) -> None:
    """In a worker without requests: from now on patterns are built as the setting says."""
    impl_class: type[SparsedAttentionImpl] = FreshPatternImpl
    packer_class: type[BatchPacker] = BatchPacker
    if setting.schedule == "reuse":
        impl_class = SparsedAttentionImpl
    elif setting.schedule == "from_start":
        packer_class = FromStartPacker
    else:
        packer_class = EveryStepPacker
    runner = worker.model_runner
    for layer in _layers(worker):
        layer.impl = _new(impl_class, layer.impl)
        layer.impl.build_pattern = BUILDERS[setting.pattern]
    runner.packer = packer_class(runner.vllm_config, runner.store, runner.device)


def start_recording(worker: Any, canvas_len: int, block_size: int, select: float) -> None:
    """In a worker without requests: from now on every dense step's patterns are recorded."""
    install(worker, DENSE)
    for layer in _layers(worker):
        layer.impl = impl = _new(RecordingImpl, layer.impl)
        impl.parameters = dict(canvas_len=canvas_len, block_size=block_size, select=select)
        impl.recorded = []


def take_recorded(worker: Any) -> torch.Tensor:
    """In a worker that records: bool [steps, layers, heads, n, n] on the CPU, since the last."""
    layers = sorted(_layers(worker), key=lambda layer: layer.layer_index)
    recorded = torch.stack([torch.stack(layer.impl.recorded) for layer in layers], dim=1)
    for layer in layers:
        layer.impl.recorded.clear()
    return recorded.cpu()


def _layers(worker: Any) -> list[Any]:
    found = get_layers_from_vllm_config(worker.model_runner.vllm_config, Attention)
    return list(found.values())


def _new(impl_class: type[SparsedAttentionImpl], old: SparsedAttentionImpl) -> Any:
    return impl_class(
        old.num_heads,
        old.head_size,
        old.scale,
        old.num_kv_heads,
        kv_cache_dtype=old.kv_cache_dtype,
        attn_type=AttentionType.ENCODER_ONLY,
    )
