"""Cases of the pattern benchmark, their random inputs, and the check of what is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from benchmarks.kernels.cases import SHAPES
from vllm_sparsed.kernels.block_importance import block_importance
from vllm_sparsed.kernels.block_importance.reference import block_importance_reference
from vllm_sparsed.kernels.block_selection import kept_columns, select_blocks
from vllm_sparsed.kernels.block_selection.torch_path import select_blocks_torch
from vllm_sparsed.kernels.pattern_building import (
    build_pattern,
    generation_start_block,
    kept_blocks_bound,
)

CHECKED_LENGTH: Final = 2000
ALLOWED_ERROR: Final = 1e-5
"""Largest error of the importance, relative to its largest value, that passes the check."""

Dense = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Takes q, k, v; returns attention and its log-sum-exp."""


@dataclass(frozen=True, slots=True)
class PatternCase:
    """One layer of one request.

    Attributes:
        length: tokens, prompt and canvas.
        shape: a key of `benchmarks.kernels.cases.SHAPES`.
        canvas: tokens of the canvas.
        select: share of the key blocks to keep in each part.
        lse_given: whether the dense step's log-sum-exp is used, as in the engine.
    """

    length: int
    block_size: int = 128
    shape: str = "llada"
    head_dim: int = 128
    canvas: int = 1024
    select: float = 0.3
    lse_given: bool = True

    @property
    def num_heads(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def num_kv_heads(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def label(self) -> str:
        length = f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        parts = [self.shape, length, f"b{self.block_size}", f"canvas{self.canvas}"]
        if self.head_dim != 128:
            parts.append(f"d{self.head_dim}")
        if not self.lse_given:
            parts.append("nolse")
        return "-".join(parts)


USUAL: Final = (
    *(PatternCase(length) for length in (65536, 16384, 4096)),
    *(PatternCase(length, shape="dream") for length in (65536, 16384)),
    *(PatternCase(16384, block_size=block) for block in (64, 32)),
    PatternCase(16384, lse_given=False),
    PatternCase(16384, canvas=8192),
    PatternCase(16384, canvas=16384),
    PatternCase(65536, canvas=8192),
    PatternCase(65536, lse_given=False),
    *(PatternCase(65536, block_size=block) for block in (64, 32)),
    *(PatternCase(length, canvas=256) for length in (1024, 2048)),
    *(PatternCase(length) for length in (8192, 32768)),
    PatternCase(16384, head_dim=64),
    PatternCase(131072),
    PatternCase(131072, block_size=32, canvas=8192),
)
"""In order of importance: a time budget cuts from the end."""

SMALL: Final = (
    PatternCase(512, block_size=32, shape="tiny", head_dim=32, canvas=128),
    PatternCase(500, block_size=64, shape="tiny", head_dim=32, canvas=128, lse_given=False),
)
"""For a CPU."""


class WrongPatternError(RuntimeError):
    """Importance or selection differs from what it should be."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Inputs of one layer and the store its pattern goes to."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor | None
    slots: Tensor
    indices: Tensor
    counts: Tensor

    @classmethod
    def random(cls, case: PatternCase, device: str, dense: Dense) -> Layer:
        """Normal values, q, k and v views of one fused tensor; bfloat16, float32 on a CPU."""
        sizes = [case.num_heads * case.head_dim] + [case.num_kv_heads * case.head_dim] * 2
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        qkv = torch.randn((case.length, sum(sizes)), dtype=dtype, device=device)
        q, k, v = (x.view(case.length, -1, case.head_dim) for x in qkv.split(sizes, dim=1))
        num_blocks = -(-case.length // case.block_size)
        first = generation_start_block(case.length, case.canvas, case.block_size)
        width = kept_blocks_bound(num_blocks, num_blocks - first, case.select)
        return cls(
            q,
            k,
            v,
            dense(q, k, v)[1] if case.lse_given else None,
            torch.randperm(num_blocks, dtype=torch.int32, device=device),
            torch.empty((num_blocks, case.num_heads, width), dtype=torch.int16, device=device),
            torch.empty((num_blocks, case.num_heads), dtype=torch.int32, device=device),
        )

    def build(self, case: PatternCase) -> None:
        """Build the pattern with this package's kernels."""
        build_pattern(
            self.q,
            self.k,
            canvas_len=case.canvas,
            block_size=case.block_size,
            select=case.select,
            scale=case.scale,
            lse=self.lse,
            pattern_rows=self.slots,
            indices=self.indices,
            counts=self.counts,
        )

    def density(self, case: PatternCase) -> float:
        """Share of the key blocks that the built pattern keeps."""
        num_blocks = -(-case.length // case.block_size)
        return float(self.counts.float().mean()) / num_blocks


def straightforward(layer: Layer, case: PatternCase) -> None:
    """Plain PyTorch in the inputs' precision, one head at a time so that L x L fits at all."""
    group = case.num_heads // case.num_kv_heads
    first = generation_start_block(case.length, case.canvas, case.block_size)
    for head in range(case.num_heads):
        kv_head = head // group
        maps = block_importance_reference(
            layer.q[:, head : head + 1],
            layer.k[:, kv_head : kv_head + 1],
            first_generation_block=first,
            block_size=case.block_size,
            scale=case.scale,
        )
        for scores in maps:
            scores.topk(kept_columns(scores.shape[2], case.select), dim=-1)


def verify(case: PatternCase, device: str) -> float:
    """Compare the maps with float64 and the selection with a stable sort: two heads, 2000 tokens.

    Returns:
        The relative error of the importance.

    Raises:
        WrongPatternError: it is too large, or other blocks are kept.
    """
    group = case.num_heads // case.num_kv_heads
    length = min(CHECKED_LENGTH, case.length)
    generator = torch.Generator(device).manual_seed(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k = (
        torch.randn((length, heads, case.head_dim), generator=generator, device=device).to(dtype)
        for heads in (2 * group, 2)
    )
    first = generation_start_block(length, length // 3, case.block_size)
    lse = None
    if case.lse_given:
        scores = torch.einsum("qhd,khd->hqk", q.double(), k.double().repeat_interleave(group, 1))
        lse = (scores * case.scale).logsumexp(dim=-1).float()
    maps = block_importance(
        q,
        k,
        first_generation_block=first,
        block_size=case.block_size,
        scale=case.scale,
        lse=lse,
    )
    exact = block_importance_reference(
        q.double(),
        k.double(),
        first_generation_block=first,
        block_size=case.block_size,
        scale=case.scale,
    )
    error = max(
        float((result - expected).abs().max() / expected.max())
        for result, expected in zip(maps, exact, strict=True)
    )
    if not error < ALLOWED_ERROR:
        raise WrongPatternError(f"relative error {error:.1e} of the importance")
    if not torch.equal(_selected(*maps, case, True), _selected(*maps, case, False)):
        raise WrongPatternError("the selection differs from a stable sort")
    return error


def _selected(importance: Tensor, generation: Tensor, case: PatternCase, kernel: bool) -> Tensor:
    """Index lists by the kernel or by PyTorch's stable sort; -1 behind each list."""
    num_heads, num_blocks, _ = importance.shape
    num_generation, device = generation.shape[2], importance.device
    first = num_blocks - num_generation
    slots = torch.arange(num_blocks, device=device)
    width = kept_blocks_bound(num_blocks, num_generation, case.select)
    indices = torch.full((num_blocks, num_heads, width), -1, dtype=torch.int16, device=device)
    counts = torch.zeros((num_blocks, num_heads), dtype=torch.int32, device=device)
    if kernel:
        select_blocks(
            importance,
            generation,
            first_generation_block=first,
            select=case.select,
            pattern_rows=slots,
            indices=indices,
            counts=counts,
        )
    else:
        select_blocks_torch(
            importance,
            generation,
            first_generation_block=first,
            num_kept=kept_columns(num_blocks, case.select),
            num_kept_generation=kept_columns(num_generation, case.select),
            pattern_rows=slots,
            indices=indices,
            counts=counts,
        )
    return indices
