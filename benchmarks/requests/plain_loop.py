"""Generate loops as a user of the released SparseD code has them: dense, and with FlexAttention.

Written from the paper (arXiv 2509.24014) and the models' own loops; see benchmarks/reference for
the same in its simplest form. As in the released code every step computes the logits of all
positions, the sparse steps run FlexAttention with a mask that looks up blocks element by element,
and the patterns are built from whole rows of the softmax, here a few thousand rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.kernels.sparse_providers import (
    RECOMPILE_LIMIT,
    RELEASED_FLEX_BLOCK,
    block_lists,
    pooled,
)
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests.plain_model import PlainModel, dense_attention, repeated

ROWS_BYTES: Final = 2**29
"""Float32 attention probabilities that exist at once while patterns are built."""


@dataclass
class SparseAttention:
    """SparseD's attention of one sequence by FlexAttention.

    Attributes:
        canvas_len: generated tokens at the end of the sequence.
        settings: SparseD's parameters.
        measured_layers: layers whose patterns are really built, so that measuring a building step
            stays short; the others use these in turn. 0: all.
        patterns: per layer built, bool [heads, query blocks, key blocks].
        masks: per layer built, FlexAttention's form of the pattern.
    """

    canvas_len: int
    settings: SparseSettings
    measured_layers: int = 0
    patterns: list[Tensor] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    _table: Tensor | None = None
    _compiled: Any = None

    def dense_and_build(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention that also builds the layer's pattern."""
        if not self.measured_layers or layer < self.measured_layers:
            self.build(q, k)
        return dense_attention(layer, q, k, v)

    def build(self, q: Tensor, k: Tensor) -> None:
        """Build the next layer's pattern from queries and keys after rotation."""
        pattern = block_pattern(q, k, self.canvas_len, self.settings)
        self.patterns.append(pattern)
        self.masks.append(self._flex_mask(pattern, q.shape[1]))

    def sparse(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the kept blocks."""
        index = layer % len(self.patterns)
        assert self._table is not None
        # One table for all layers: a mask function for each would be compiled for each.
        self._table.copy_(self.patterns[index])
        attend = self._attend(q.device.type)
        k, v = repeated(k, q).contiguous(), repeated(v, q).contiguous()
        out: Tensor = attend(q[None], k[None], v[None], block_mask=self.masks[index])
        return out[0]

    def _attend(self, device: str) -> Any:
        from torch.nn.attention.flex_attention import flex_attention

        if device != "cuda":
            return flex_attention
        if self._compiled is None:
            torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
            torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
            self._compiled = torch.compile(flex_attention, dynamic=False)
        return self._compiled

    def _flex_mask(self, pattern: Tensor, length: int) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        block_size = self.settings.block_size
        if self._table is None:
            self._table = torch.empty_like(pattern)
        table = self._table

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return table[head, query // block_size, key // block_size]

        counts, indices = block_lists(pooled(pattern, max(1, RELEASED_FLEX_BLOCK // block_size)))
        return BlockMask.from_kv_blocks(
            counts,
            indices,
            BLOCK_SIZE=max(RELEASED_FLEX_BLOCK, block_size),
            mask_mod=mask_mod,
            seq_lengths=(length, length),
            compute_q_blocks=False,
        )


def block_pattern(q: Tensor, k: Tensor, canvas_len: int, settings: SparseSettings) -> Tensor:
    """Kept blocks of one layer, one head and some thousand rows at a time.

    Args:
        q: [heads, L, D], after rotation.
        k: [kv heads, L, D], after rotation.
        canvas_len: generated tokens at the end.
        settings: SparseD's parameters.

    Returns:
        bool [heads, query blocks, key blocks].
    """
    heads, length, head_dim = q.shape
    block_size = settings.block_size
    num_blocks = -(-length // block_size)
    generation = [b for b in range(num_blocks) if length - b * block_size <= canvas_len]
    first = generation[0] if generation else num_blocks - 1
    rows = max(1, ROWS_BYTES // (4 * length * block_size)) * block_size
    kept = torch.zeros(heads, num_blocks, num_blocks, dtype=torch.bool, device=q.device)
    for head in range(heads):
        keys = k[head * k.shape[0] // heads].T
        for start in range(0, length, rows):
            scores = (q[head, start : start + rows] @ keys).float().mul_(head_dim**-0.5)
            block = start // block_size
            to = kept[head, block : block + -(-len(scores) // block_size)]
            _keep_top(scores, to, 0, block_size, settings.select)
            to[:, first:] = False
            _keep_top(scores[:, first * block_size :], to, first, block_size, settings.select)
    return kept


def _keep_top(scores: Tensor, kept: Tensor, first: int, block_size: int, select: float) -> None:
    """Mark the top key blocks from `first` on in kept [query blocks, key blocks].

    Scores [rows, columns] hold those key blocks alone.
    """
    probabilities = scores.softmax(dim=-1)
    down, right = -scores.shape[0] % block_size, -scores.shape[1] % block_size
    if down or right:
        probabilities = torch.nn.functional.pad(probabilities, (0, right, 0, down))
    blocks = probabilities.view(kept.shape[0], block_size, -1, block_size)
    importance = blocks.mean(dim=(1, 3))
    columns = importance.shape[1]
    count = min(columns, max(1, int(columns * select) + 1))
    kept[:, first:].scatter_(1, importance.topk(count, dim=1).indices, True)


@torch.no_grad()
def denoise(
    model: PlainModel, tokens: Tensor, prompt_len: int, unmasked: int, attend: Any
) -> Tensor:
    """One step: logits of all positions, then the most confident masks become tokens.

    Args:
        model: LLaDA or Dream.
        tokens: int64 [L].
        prompt_len: tokens before the canvas.
        unmasked: masks to decide.
        attend: how each layer attends.

    Returns:
        The new tokens [L].
    """
    dims = model.dimensions
    logits = model.logits(tokens, attend)
    masked = tokens == dims.mask_token_id
    if dims.logit_shift:
        # As in Dream's own loop: shifted as a whole, then only masked rows are looked at.
        logits = torch.cat((logits[:1], logits[:-1]))[masked]
        probabilities = logits.softmax(dim=-1)
        confidence, candidates = probabilities.max(dim=-1)
        positions = masked.nonzero()[:, 0]
    else:
        # As in LLaDA's own loop: candidates and confidences of all positions.
        candidates = logits.argmax(dim=-1)
        probabilities = logits.softmax(dim=-1)
        confidence = probabilities.gather(1, candidates[:, None])[:, 0]
        confidence = confidence.masked_fill(~masked, -torch.inf)
        confidence[:prompt_len] = -torch.inf
        positions = torch.arange(len(tokens), device=tokens.device)
    count = min(unmasked, int(masked[prompt_len:].sum()))
    chosen = confidence.topk(count).indices
    new = tokens.clone()
    new[positions[chosen]] = candidates[chosen]
    return new
