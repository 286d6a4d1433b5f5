"""Packs the sequences of one forward pass into vLLM's batch layout."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import EncoderOnlyAttentionSpec

from vllm_sparsed.attention.metadata import DenoisingAttentionMetadata, SequencePhase
from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.planning.crossover import FlashAttention4Range
from vllm_sparsed.worker.request_state import RequestState

MAX_BATCHES: Final = 16
"""Packed batches that are kept; the one not used for longest goes first. They are fewer than CUDA
graphs: a batch is recorded when it is found again, so batches that take turns drive out no graph.
"""

PackedSequence = tuple[RequestState, int]
"""A request and which of its sequences: 0 conditional, 1 unconditional (guidance)."""

_BatchKey = tuple[tuple[tuple[int, int], ...], tuple[PackedSequence, ...]]
"""How the sequences attend (`SequencePhase.order`), and which they are."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedBatch:
    """Sequences side by side, in the order of their attention phases.

    One object is used while sequences and phases stay or come again, and compared by identity.

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

    def write_token_ids(self, out: npt.NDArray[np.int32]) -> None:
        """Write the present tokens of all sequences to int32 [tokens]."""
        tokens = [state.sequence_tokens(index) for state, index in self.sequences]
        np.concatenate(tokens, out=out)


class BatchPacker:
    """Builds packed batches and keeps the last few: requests take turns, so batches come again."""

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
        self._batches: OrderedDict[_BatchKey, PackedBatch] = OrderedDict()

    def use_flash_attention_4(self, fa4: FlashAttention4Range | None) -> None:
        """From now on let FlashAttention 4 attend where it is chosen; None: nowhere."""
        self._builder.fa4 = fa4
        self._batches.clear()

    def forget(self, states: Iterable[RequestState]) -> None:
        """Drop what is kept of requests that are gone."""
        gone = set(states)
        for key in [k for k in self._batches if any(state in gone for state, _ in k[1])]:
            del self._batches[key]

    def pack(self, sequences: Sequence[PackedSequence]) -> PackedBatch:
        """Pack sequences, in any order, for one pass."""
        orders = [state.attention_order() for state, _ in sequences]
        if any(a > b for a, b in pairwise(orders)):
            by_order = sorted(range(len(sequences)), key=orders.__getitem__)
            sequences = [sequences[i] for i in by_order]
            orders = [orders[i] for i in by_order]
        key: _BatchKey = tuple(orders), tuple(sequences)
        batch = self._batches.get(key)
        if batch is None:
            phases = [state.phase(index) for state, index in sequences]
            batch = self._batches[key] = self._build(sequences, phases)
            if len(self._batches) > MAX_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(key)
        return batch

    def _build(
        self, sequences: Sequence[PackedSequence], phases: Sequence[SequencePhase]
    ) -> PackedBatch:
        lengths = [state.plan.seq_len for state, _ in sequences]
        starts = itertools.accumulate(lengths, initial=0)
        return replace(
            self.batch(lengths, phases),
            sequences=tuple(sequences),
            starts={
                (s.request_id, i): start for (s, i), start in zip(sequences, starts, strict=False)
            },
        )

    def dense_batch(self, lengths: Sequence[int]) -> tuple[torch.Tensor, dict[str, Any]]:
        """Positions and attention metadata of dense sequences that belong to no request."""
        batch = self.batch(lengths, [SequencePhase(canvas_len=length) for length in lengths])
        return batch.positions, batch.attention

    def batch(self, lengths: Sequence[int], phases: Sequence[SequencePhase]) -> PackedBatch:
        """Sequences that belong to no request.

        Args:
            lengths: tokens of each sequence.
            phases: how each attends, in the order of `SequencePhase.order`.
        """
        metadata = self._metadata(np.array(lengths, dtype=np.int32), phases)
        assert metadata.positions is not None
        return PackedBatch(
            sequences=(),
            starts={},
            num_tokens=metadata.num_actual_tokens,
            positions=metadata.positions,
            attention=dict.fromkeys(self._layer_names, self._builder.build(0, metadata)),
        )

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
