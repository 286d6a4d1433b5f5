"""What share of the key blocks new patterns keep, for the log and the counters."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.logger import init_logger
from vllm_sparsed.scheduling.metrics import StepCounters
from vllm_sparsed.worker.request_state import RequestState

logger = init_logger(__name__)


def kept_blocks(building: Sequence[RequestState], store: PatternStore) -> torch.Tensor:
    """int64 [requests] on the device: key blocks that new patterns keep, over layers and heads."""
    kept = []
    for state in building:
        rows = np.concatenate(state.pattern_rows).astype(np.int64)
        counts = store.counts[:, to_device(rows, store.counts.device)]
        kept.append(counts.sum(dtype=torch.int64))
    return torch.stack(kept)


def report_density(
    building: Sequence[RequestState],
    kept: npt.NDArray[np.int64],
    store: PatternStore,
    counters: StepCounters | None,
) -> None:
    """Log each new pattern's density and add it to the counters, where this process has them."""
    num_layers, _, num_heads = store.counts.shape
    for state, kept_by_request in zip(building, kept.tolist(), strict=True):
        plan = state.plan
        num_blocks = plan.num_pattern_rows // plan.num_sequences
        candidates = plan.num_pattern_rows * num_blocks * num_layers * num_heads
        logger.debug(
            "Request %s: density %.4f over %d x %d blocks of %d tokens",
            state.request_id,
            kept_by_request / candidates,
            num_blocks,
            num_blocks,
            plan.block_size,
        )
        if counters is not None:
            counters.add(0, 0, kept_by_request, candidates)
