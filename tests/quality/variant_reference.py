"""Baselines and ablations in plain PyTorch: every block of every row chosen in the open."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.quality.settings import Setting
from benchmarks.reference.models import LayerAttention, ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSettings, block_pattern, token_mask


@dataclass(slots=True)
class VariantSequence:
    """One sequence under a setting, as benchmarks.reference.generate runs it.

    Attributes:
        built: per step in which patterns were built, bool [layers, heads, n, n].
        dense: steps with full attention.
    """

    model: ReferenceModel
    canvas_len: int
    total_steps: int
    setting: Setting
    built: dict[int, Tensor] = field(default_factory=dict)
    dense: list[int] = field(default_factory=list)

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        setting = self.setting
        if setting.is_dense or step < setting.first_sparse_step(self.total_steps):
            self.dense.append(step)
            logits, layers = self.model.logits(tokens)
            if step == setting.first_sparse_step(self.total_steps) - 1 and not setting.is_dense:
                self.built[step] = torch.stack([self._pattern(layer) for layer in layers])
            return logits
        if setting.schedule == "every_step" or not self.built:
            self.built[step] = self._sparse_patterns(tokens)
        patterns = self.built[max(self.built)]
        return self.model.logits(tokens, self._masks(patterns, len(tokens)))[0]

    def _sparse_patterns(self, tokens: Tensor) -> Tensor:
        """Layer by layer: a layer's queries follow from sparse attention in those below it."""
        patterns: list[Tensor] = []
        for layer in range(self.model.dimensions.num_layers):
            masks = self._masks(patterns, len(tokens))
            full = torch.ones(1, len(tokens), len(tokens), dtype=torch.bool)
            masks += [full] * (self.model.dimensions.num_layers - layer)
            patterns.append(self._pattern(self.model.logits(tokens, masks)[1][layer]))
        return torch.stack(patterns)

    def _masks(self, patterns: list[Tensor] | Tensor, length: int) -> list[Tensor]:
        assert self.setting.block_size is not None
        return [token_mask(pattern, length, self.setting.block_size) for pattern in patterns]

    def _pattern(self, layer: LayerAttention) -> Tensor:
        return kept_blocks(layer, self.canvas_len, self.setting)


def kept_blocks(layer: LayerAttention, canvas_len: int, setting: Setting) -> Tensor:
    """Kept blocks of one layer, bool [heads, query blocks, key blocks]."""
    assert setting.select is not None and setting.block_size is not None
    size = setting.block_size
    sparse = block_pattern(layer, canvas_len, SparseSettings(0.0, setting.select, size))
    if setting.pattern == "sparsed":
        return sparse
    heads, num_blocks, _ = sparse.shape
    scores = layer.query @ layer.key.transpose(1, 2) * layer.query.shape[-1] ** -0.5
    importance = _block_sums(scores.softmax(dim=-1), size)
    if setting.pattern == "shared_heads":
        length = scores.shape[-1]
        last = next(b for b in range(num_blocks) if length - b * size <= canvas_len)
        generation = _block_sums(scores[..., last * size :].softmax(dim=-1), size)
        kept = _top(importance.mean(dim=0), setting.select)
        kept[:, last:] = _top(generation.mean(dim=0), setting.select)
        return kept.expand(heads, -1, -1)
    kept = torch.zeros_like(sparse)
    for head in range(heads):
        for row in range(num_blocks):
            count = int(sparse[head, row].sum())
            if setting.pattern == "window":
                columns = _window(row, count, 0, num_blocks)
            elif setting.pattern == "sink_window":
                columns = [0, *_window(row, count - 1, 1, num_blocks)] if count > 1 else [row]
            else:
                columns = importance[head, row].topk(count).indices.tolist()
            kept[head, row, columns] = True
    return kept


def _window(row: int, count: int, first: int, end: int) -> list[int]:
    """`count` blocks of [first, end) with the row's in the middle, where there is room."""
    start = min(max(row - (count - 1) // 2, first), end - count)
    return list(range(start, start + count))


def _block_sums(probabilities: Tensor, size: int) -> Tensor:
    """[heads, L, keys] -> sums of blocks [heads, row blocks, key blocks]."""
    rows = torch.stack([part.sum(dim=1) for part in probabilities.split(size, dim=1)], dim=1)
    return torch.stack([part.sum(dim=2) for part in rows.split(size, dim=2)], dim=2)


def _top(importance: Tensor, select: float) -> Tensor:
    """bool like importance [rows, columns]."""
    columns = importance.shape[-1]
    count = min(columns, max(1, int(columns * select) + 1))
    kept = torch.zeros_like(importance, dtype=torch.bool)
    return kept.scatter(-1, importance.topk(count, dim=-1).indices, True)
