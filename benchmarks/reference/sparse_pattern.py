"""SparseD's block patterns, arXiv 2509.24014, with the whole attention matrix in memory."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.reference.models import LayerAttention, ReferenceModel


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """SparseD's parameters.

    Attributes:
        skip: share of the steps with full attention.
        select: share of the blocks that a row keeps, rho.
        block_size: tokens of a block.
    """

    skip: float
    select: float
    block_size: int


@dataclass(slots=True)
class SparseSequence:
    """One sequence's forward passes: dense until step t*, then through the patterns of that step.

    Attributes:
        canvas_len: generated tokens at the end of the sequence.
        total_steps: T.
        settings: None: all steps are dense.
        patterns: per layer bool [heads, query blocks, key blocks], once built.
    """

    model: ReferenceModel
    canvas_len: int
    total_steps: int
    settings: SparseSettings | None = None
    patterns: list[Tensor] | None = field(default=None, init=False)

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        """Logits [L, vocabulary] of the tokens [L] in a step."""
        if self.settings is None:
            return self.model.logits(tokens)[0]
        last_dense_step = int(self.total_steps * self.settings.skip) + 1
        if step <= last_dense_step:
            logits, layers = self.model.logits(tokens)
            if step == last_dense_step:
                self.patterns = [
                    block_pattern(layer, self.canvas_len, self.settings) for layer in layers
                ]
            return logits
        assert self.patterns is not None
        masks = [token_mask(p, len(tokens), self.settings.block_size) for p in self.patterns]
        return self.model.logits(tokens, masks)[0]


@dataclass(slots=True)
class PacedSparseSequence:
    """The same where the number of passes is not known: progress is what is decided.

    A pass is dense while less than `skip` of the canvas is decided; the first one that begins at or
    above it, never the first of all, builds the patterns, later ones are sparse.

    Attributes:
        mask_token_id: of an undecided position.
        built_in: passes before the one that built the patterns.
    """

    model: ReferenceModel
    canvas_len: int
    mask_token_id: int
    settings: SparseSettings | None = None
    patterns: list[Tensor] | None = field(default=None, init=False)
    passes: int = field(default=0, init=False)
    built_in: int | None = field(default=None, init=False)

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        """Logits [L, vocabulary] of the tokens [L]; the step is not needed."""
        self.passes += 1
        if self.settings is not None and self.patterns is not None:
            masks = [token_mask(p, len(tokens), self.settings.block_size) for p in self.patterns]
            return self.model.logits(tokens, masks)[0]
        logits, layers = self.model.logits(tokens)
        canvas = tokens[len(tokens) - self.canvas_len :]
        decided = int((canvas != self.mask_token_id).sum()) / self.canvas_len
        if self.settings is not None and self.passes > 1 and decided >= self.settings.skip:
            self.built_in = self.passes - 1
            self.patterns = [
                block_pattern(layer, self.canvas_len, self.settings) for layer in layers
            ]
        return logits


def block_pattern(layer: LayerAttention, canvas_len: int, settings: SparseSettings) -> Tensor:
    """Kept blocks of one layer, bool [heads, query blocks, key blocks]."""
    block_size = settings.block_size
    group = layer.query.shape[0] // layer.key.shape[0]
    key = layer.key.repeat_interleave(group, dim=0)
    scores = layer.query @ key.transpose(1, 2) * layer.query.shape[-1] ** -0.5
    length = scores.shape[-1]
    num_blocks = -(-length // block_size)
    generation = [b for b in range(num_blocks) if length - b * block_size <= canvas_len]
    last = generation[0] if generation else num_blocks - 1

    kept = _top_columns(_block_importance(scores.softmax(dim=-1), block_size), settings.select)
    kept[:, :, last:] = False
    among_generated = scores[:, :, last * block_size :].softmax(dim=-1)
    kept[:, :, last:] = _top_columns(
        _block_importance(among_generated, block_size), settings.select
    )
    return kept


def token_mask(pattern: Tensor, length: int, block_size: int) -> Tensor:
    """bool [heads, L, L] of a block pattern."""
    rows = pattern.repeat_interleave(block_size, dim=1)
    return rows.repeat_interleave(block_size, dim=2)[:, :length, :length]


def _block_importance(probabilities: Tensor, block_size: int) -> Tensor:
    """Mean over blocks [heads, row blocks, column blocks]; what a last block lacks counts as 0."""
    heads, rows, columns = probabilities.shape
    row_blocks, column_blocks = -(-rows // block_size), -(-columns // block_size)
    padded = probabilities.new_zeros(heads, row_blocks * block_size, column_blocks * block_size)
    padded[:, :rows, :columns] = probabilities
    blocks = padded.view(heads, row_blocks, block_size, column_blocks, block_size)
    return blocks.mean(dim=(2, 4))


def _top_columns(importance: Tensor, select: float) -> Tensor:
    num_columns = importance.shape[-1]
    kept = min(num_columns, max(1, int(num_columns * select) + 1))
    mask = torch.zeros_like(importance, dtype=torch.bool)
    return mask.scatter(-1, importance.topk(kept, dim=-1).indices, True)
