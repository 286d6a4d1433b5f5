"""The decision by stable sorts: on CPUs, and for many rows."""

import torch
from torch import Tensor


def decide_rows_torch(
    candidates: Tensor,
    confidence: Tensor,
    request: Tensor,
    first_row: Tensor,
    num_to_unmask: Tensor,
    passes: Tensor | None,
) -> Tensor:
    """As `decide_rows_reference`, on tensors; request: int64 [rows], ascending."""
    ranking = confidence.sort(descending=True, stable=True).indices
    ranking = ranking[request[ranking].sort(stable=True).indices]
    rank = torch.arange(len(candidates), device=candidates.device) - first_row[request]
    selected = torch.empty_like(rank, dtype=torch.bool)
    selected.scatter_(0, ranking, rank < num_to_unmask[request])
    if passes is not None:
        selected &= passes
    return torch.where(selected, candidates, -1)
