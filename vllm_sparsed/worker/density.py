"""What share of the key blocks new patterns keep, for the log and the scheduler's counters."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.logger import init_logger
from vllm_sparsed.worker.request_state import RequestState
from vllm_sparsed.worker.step_output import StepReport

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
    reports: Mapping[str, StepReport],
) -> None:
    """Log each new pattern's density and put it into the request's report."""
    num_layers, _, num_heads = store.counts.shape
    for state, kept_by_request in zip(building, kept.tolist(), strict=True):
        plan = state.plan
        num_blocks = plan.num_pattern_rows // plan.num_sequences
        report = reports[state.request_id]
        report.kept_blocks = kept_by_request
        report.pattern_blocks = plan.num_pattern_rows * num_blocks * num_layers * num_heads
        logger.debug(
            "Request %s: density %.4f over %d x %d blocks of %d tokens",
            state.request_id,
            report.kept_blocks / report.pattern_blocks,
            num_blocks,
            num_blocks,
            plan.block_size,
        )
