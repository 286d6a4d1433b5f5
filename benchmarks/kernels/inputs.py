"""Random inputs of one attention case, their exact result, and the check against it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case

CHECKED_ROWS: Final = 64
"""Queries that each provider is checked on, drawn from the whole batch."""


@dataclass(frozen=True)
class Inputs:
    """One layer's inputs and block pattern.

    Attributes:
        case: what they are.
        q: [tokens, num_heads, head_dim], a view of one fused tensor, as k and v are.
        k, v: [tokens, num_kv_heads, head_dim].
        indices: int16 [rows, num_heads, width], kept key blocks within the request, ascending;
            rows are the query blocks of all requests in order.
        counts: int32 [rows, num_heads], how many of them are valid.
    """

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    indices: Tensor
    counts: Tensor

    @classmethod
    def random(cls, case: Case, device: str) -> Inputs:
        """Normal values; in each row and head `select` of the request's blocks, drawn evenly."""
        heads = [case.num_heads, case.num_kv_heads, case.num_kv_heads]
        shape = (case.num_tokens, sum(heads), case.head_dim)
        q, k, v = torch.randn(shape, device=device, dtype=case.dtype).split(heads, dim=1)
        blocks = [length // case.block_size for length in case.lengths]
        kept = [max(1, round(case.select * n)) for n in blocks]
        rows = sum(blocks)
        indices = torch.zeros(rows, case.num_heads, max(kept), dtype=torch.int16, device=device)
        counts = torch.empty(rows, case.num_heads, dtype=torch.int32, device=device)
        first = 0
        for n, width in zip(blocks, kept, strict=True):
            counts[first : first + n] = width
            for head in range(case.num_heads):
                chosen = torch.rand(n, n, device=device).topk(width, dim=1).indices
                indices[first : first + n, head, :width] = chosen.sort(dim=1).values.short()
            first += n
        return cls(case, q, k, v, indices, counts)

    @property
    def device(self) -> str:
        return self.q.device.type

    @property
    def scale(self) -> float:
        return float(self.case.head_dim**-0.5)

    @property
    def starts(self) -> list[int]:
        """First token of each request."""
        lengths = self.case.lengths
        return [sum(lengths[:i]) for i in range(len(lengths))]

    @property
    def spans(self) -> list[slice]:
        """Tokens of each request."""
        return [
            slice(start, start + n) for start, n in zip(self.starts, self.case.lengths, strict=True)
        ]

    @cached_property
    def density(self) -> float:
        """Share of the blocks within the requests that is kept."""
        blocks = [length // self.case.block_size for length in self.case.lengths]
        total = self.case.num_heads * sum(n * n for n in blocks)
        return float(self.counts.sum(dtype=torch.int64)) / total

    def flops(self, density: float) -> float:
        """Of both products over this share of the blocks."""
        pairs = sum(length**2 for length in self.case.lengths)
        return 4.0 * pairs * density * self.case.head_dim * self.case.num_heads

    @cached_property
    def first_blocks(self) -> Tensor:
        """int64 [rows]: the first key block of each row's request, among all requests' blocks."""
        blocks = torch.tensor([n // self.case.block_size for n in self.case.lengths])
        return (blocks.cumsum(0) - blocks).repeat_interleave(blocks).to(self.q.device)

    @cached_property
    def block_map(self) -> Tensor:
        """bool [num_heads, rows, rows]: the kept blocks, the requests as one long sequence."""
        rows, heads, width = self.indices.shape
        # One more column takes what lies behind the end of a list.
        kept = torch.zeros(heads, rows, rows + 1, dtype=torch.bool, device=self.q.device)
        columns = self.indices.long() + self.first_blocks[:, None, None]
        behind = torch.arange(width, device=self.q.device) >= self.counts[..., None]
        kept.scatter_(2, columns.masked_fill(behind, rows).transpose(0, 1), True)
        return kept[:, :, :rows].contiguous()

    @cached_property
    def checked_rows(self) -> Tensor:
        """int64, sorted: the queries that results are checked on."""
        count = min(CHECKED_ROWS, self.case.num_tokens)
        return torch.randperm(self.case.num_tokens, device=self.q.device)[:count].sort().values

    @cached_property
    def exact_dense(self) -> Tensor:
        """Float64 [checked rows, num_heads, head_dim]: full attention within each request."""
        return self._exact(None)

    @cached_property
    def exact_sparse(self) -> Tensor:
        """Float64 [checked rows, num_heads, head_dim]: over the kept blocks alone."""
        return self._exact(self.block_map)

    def _exact(self, block_map: Tensor | None) -> Tensor:
        case, rows, device = self.case, self.checked_rows, self.q.device
        lengths = torch.tensor(case.lengths)
        request = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        foreign = request[rows][:, None] != request
        block = torch.arange(case.num_tokens, device=device) // case.block_size
        shape = (len(rows), case.num_heads, case.head_dim)
        out = torch.empty(shape, dtype=torch.float64, device=device)
        for head in range(case.num_heads):
            kv_head = head * case.num_kv_heads // case.num_heads
            scores = self.q[rows, head].double() @ self.k[:, kv_head].double().T * self.scale
            scores.masked_fill_(foreign, float("-inf"))
            if block_map is not None:
                kept = block_map[head, rows // case.block_size]
                scores.masked_fill_(~kept[:, block], float("-inf"))
            out[:, head] = torch.softmax(scores, dim=-1) @ self.v[:, kv_head].double()
        return out


class WrongResultError(RuntimeError):
    """A provider's output is further from float64 than rounding explains."""


def verify(out: Tensor, x: Inputs, sparse: bool) -> float:
    """Compare the checked rows of an output [tokens, num_heads, head_dim] with float64.

    Returns:
        The largest absolute error.

    Raises:
        WrongResultError: it is too large, or not a number.
    """
    exact = x.exact_sparse if sparse else x.exact_dense
    error = (out[x.checked_rows].double() - exact).abs().max().item()
    # In 16 bits outputs and weights are rounded once each; in float32 long sums round many times.
    roundings = 32 if x.case.dtype == torch.float32 else 4
    allowed = roundings * torch.finfo(x.case.dtype).eps * exact.abs().max().item()
    if not error <= allowed:
        raise WrongResultError(f"wrong result: error {error:.2e}, allowed {allowed:.2e}")
    return error
