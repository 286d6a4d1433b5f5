"""Packs the sequences of one forward pass into vLLM's batch layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec

from vllm_sparsed.attention.metadata import DenoisingAttentionMetadata, SequencePhase
from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.worker.device_copy import to_device
from vllm_sparsed.worker.request_state import RequestState

PackedSequence = tuple[RequestState, int]
"""A request and which of its sequences: 0 conditional, 1 unconditional (guidance)."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences side by side, in the order of their attention phases.

    Attributes:
        sequences: in packed order.
        starts: first packed token of each sequence, by request id and sequence index.
        num_tokens: tokens of all sequences.
        positions: int64 [tokens] on the device, position within the sequence.
        attention: metadata by layer name, as vLLM's forward context wants it.
    """

    sequences: tuple[PackedSequence, ...]
    starts: dict[tuple[str, int], int]
    num_tokens: int
    positions: torch.Tensor
    attention: dict[str, Any]

    def token_ids(self) -> npt.NDArray[np.int32]:
        """int32 [tokens]: the present tokens of all sequences."""
        return np.concatenate([state.sequence_tokens(index) for state, index in self.sequences])


class BatchPacker:
    """Builds packed batches and keeps those of the last step while sequences and phases stay."""

    def __init__(
        self, vllm_config: VllmConfig, store: PatternStore | None, device: torch.device
    ) -> None:
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        first = next(iter(layers.values()))
        spec = EncoderOnlyAttentionSpec(
            block_size=vllm_config.cache_config.block_size or 16,
            num_kv_heads=first.num_kv_heads,
            head_size=first.head_size,
            dtype=vllm_config.model_config.dtype,
        )
        self._layer_names = list(layers)
        self._builder = first.attn_backend.get_builder_cls()(
            spec, self._layer_names, vllm_config, device
        )
        self._store = store
        self._device = device
        self._last: dict[int, tuple[tuple[tuple[int, int], ...], PackedBatch]] = {}

    def pack(self, sequences: Sequence[PackedSequence], pass_index: int) -> PackedBatch:
        """Pack sequences for one pass.

        Args:
            sequences: in any order.
            pass_index: which pass of the step; each keeps a batch of its own.
        """
        phases = [state.phase(index) for state, index in sequences]
        order = sorted(range(len(sequences)), key=lambda i: phases[i].order)
        packed = tuple(sequences[i] for i in order)
        orders = tuple(phases[i].order for i in order)
        last = self._last.get(pass_index)
        if last is None or last[0] != orders or last[1].sequences != packed:
            batch = self._build(packed, [phases[i] for i in order])
            last = self._last[pass_index] = (orders, batch)
        return last[1]

    def _build(
        self, sequences: Sequence[PackedSequence], phases: Sequence[SequencePhase]
    ) -> PackedBatch:
        lengths = np.array([state.plan.seq_len for state, _ in sequences], dtype=np.int32)
        metadata = self._metadata(lengths, phases)
        starts = metadata.query_start_loc_cpu.tolist()
        assert metadata.positions is not None
        attention = self._builder.build(0, metadata)
        return PackedBatch(
            sequences=tuple(sequences),
            starts={(s.request_id, i): starts[n] for n, (s, i) in enumerate(sequences)},
            num_tokens=metadata.num_actual_tokens,
            positions=metadata.positions,
            attention=dict.fromkeys(self._layer_names, attention),
        )

    def dense_batch(self, lengths: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Positions and attention metadata of a batch of dense sequences, to measure memory."""
        phases = [SequencePhase(canvas_len=length) for length in lengths]
        metadata = self._metadata(np.array(lengths, dtype=np.int32), phases)
        attention = self._builder.build(0, metadata)
        assert metadata.positions is not None
        return metadata.positions, dict.fromkeys(self._layer_names, attention)

    def _metadata(
        self, lengths: npt.NDArray[np.int32], phases: Sequence[SequencePhase]
    ) -> DenoisingAttentionMetadata:
        start_loc = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=start_loc[1:])
        num_tokens = int(start_loc[-1])
        positions = np.arange(num_tokens, dtype=np.int64) - np.repeat(start_loc[:-1], lengths)
        longest = int(lengths.max())
        device = self._device
        return DenoisingAttentionMetadata(
            query_start_loc=to_device(start_loc, device),
            query_start_loc_cpu=torch.from_numpy(start_loc),
            seq_lens=to_device(lengths, device),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=len(lengths),
            num_actual_tokens=num_tokens,
            max_query_len=longest,
            max_seq_len=longest,
            # No key/value cache: backends want the fields, none reads what they hold.
            block_table_tensor=torch.zeros((len(lengths), 1), dtype=torch.int32, device=device),
            slot_mapping=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            causal=False,
            positions=to_device(positions, device),
            phases=phases,
            store=self._store,
        )
