"""Denoising with stored keys and values, one sequence at a time: `prefix`, `dual` and `window`.

A refresh runs all rows and stores their keys and values. A window pass runs the rows of a window
alone, replaces what is stored of them and attends to all that is stored. Temperature 0.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.reference.models import ReferenceModel, StoredLayer
from benchmarks.reference.sparse_pattern import SparseSettings, block_pattern, token_mask

Mode = Literal["none", "prefix", "dual", "window"]


@dataclass(frozen=True, slots=True)
class Pace:
    """How many candidates a pass decides, and in which order; see docs of the parameters.

    Attributes:
        alg: threshold, factor, entropy_bound, entropy_threshold, or a scheduled algorithm:
            low_confidence (LLaDA's shares), entropy, maskgit_plus or topk_margin (Dream's times).
        value: of the pace; None where scheduled.
        steps: of the whole request, where scheduled.
        last_rank: factor: a rank that fails alone, as the last, is decided too (Fast-dLLM).
    """

    alg: str
    value: float | None = None
    steps: int = 0
    last_rank: bool = False


@dataclass(frozen=True, slots=True)
class Reuse:
    """The mode and, for `window`, its parameters; `refresh_passes` None: no limit."""

    mode: Mode
    warmup_passes: int = 1
    refresh_tokens: int = 1
    refresh_passes: int | None = None
    margin: int = 16


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass.

    Attributes:
        rows: [start, end) in the sequence; None: all of them.
        attention: dense, build (dense, and the patterns are made) or sparse.
        decided: (position in the sequence, token), ascending.
    """

    rows: tuple[int, int] | None
    attention: str
    decided: tuple[tuple[int, int], ...]


def generate_with_reuse(
    model: ReferenceModel,
    prompt: Tensor,
    canvas_len: int,
    block_length: int,
    pace: Pace,
    reuse: Reuse,
    sparse: SparseSettings | None = None,
) -> list[Pass]:
    """Fill the canvas block by block; block length and steps must divide evenly."""
    return _Loop(model, prompt, canvas_len, block_length, pace, reuse, sparse).run()


class _Loop:
    def __init__(
        self,
        model: ReferenceModel,
        prompt: Tensor,
        canvas_len: int,
        block_length: int,
        pace: Pace,
        reuse: Reuse,
        sparse: SparseSettings | None,
    ) -> None:
        self.model, self.pace, self.reuse, self.sparse = model, pace, reuse, sparse
        self.mask_id = model.dimensions.mask_token_id
        self.shift = int(model.dimensions.logit_shift)
        self.tokens = torch.cat((prompt, prompt.new_full((canvas_len,), self.mask_id)))
        self.prompt_len, self.canvas_len, self.block_length = len(prompt), canvas_len, block_length
        self.patterns: list[Tensor] | None = None
        self.stored: list[StoredLayer] = []
        self.passes: list[Pass] = []
        # Since the last refresh, itself included.
        self.passes_since, self.decided_since = 0, 0
        self.step = 0

    def run(self) -> list[Pass]:
        num_blocks = self.canvas_len // self.block_length
        for block in range(num_blocks):
            start = self.prompt_len + block * self.block_length
            end = start + self.block_length
            steps = self.pace.steps // num_blocks
            taken, index = 0, 0
            while (masked := self.masked(end)).numel():
                # Fast-dLLM's Dream: the pass that begins a block decides its first position alone.
                first_alone = (
                    self.shift == 1 and self.reuse.mode in ("prefix", "dual") and taken == 0
                )
                count = None
                if self.pace.value is None:
                    count = 1 if first_alone else self.scheduled(len(masked), index, steps)
                    if count == 0:
                        index += 1
                        self.step += 1
                        continue
                if first_alone:
                    masked, count = masked[:1], 1
                self.run_pass(masked, count, start, end, first=taken == 0)
                taken += 1
                index += 1
                self.step += 1
        return self.passes

    def masked(self, end: int) -> Tensor:
        return (self.tokens[:end] == self.mask_id).nonzero()[:, 0]

    def scheduled(self, masks_left: int, index: int, steps: int) -> int:
        if self.pace.alg == "low_confidence":
            return self.block_length // steps + (index < self.block_length % steps)
        if index >= steps - 1:
            return masks_left
        times = torch.linspace(1, 1e-3, steps + 1)
        return int(masks_left * (1 - times[index + 1] / times[index]))

    def run_pass(
        self, candidates: Tensor, count: int | None, start: int, end: int, first: bool
    ) -> None:
        rows = self.window(candidates, start, end, first)
        if rows is None:
            attention, logits = self.refresh()
        else:
            attention = "dense" if self.patterns is None else "sparse"
            masks = None if self.patterns is None else self.window_masks(*rows)
            logits, _ = self.model.logits(
                self.tokens[rows[0] : rows[1]], masks, self.stored, rows[0]
            )
        source = (candidates - self.shift).clamp(min=0) - (0 if rows is None else rows[0])
        chosen, tokens = self.decide(logits[source.clamp(min=0)], count)
        self.tokens[candidates[chosen]] = tokens[chosen]
        decided = zip(candidates[chosen].tolist(), tokens[chosen].tolist(), strict=True)
        self.passes.append(Pass(rows, attention, tuple(decided)))
        if rows is None:
            self.passes_since, self.decided_since = 0, 0
        self.passes_since += 1
        self.decided_since += max(1, len(chosen))

    def window(
        self, candidates: Tensor, start: int, end: int, first: bool
    ) -> tuple[int, int] | None:
        """Rows of the coming pass; None: a refresh."""
        reuse, length = self.reuse, len(self.tokens)
        if reuse.mode == "none":
            return None
        if reuse.mode in ("prefix", "dual"):
            return None if first else (start, length if reuse.mode == "prefix" else end)
        left = start
        if first:
            left = max(self.prompt_len, start - self.block_length)
        left = max(0, min(left - reuse.margin, start - self.shift))
        right = min(length, end + reuse.margin)
        due = (
            len(self.passes) < reuse.warmup_passes
            or self.decided_since >= reuse.refresh_tokens
            or (reuse.refresh_passes is not None and self.passes_since >= reuse.refresh_passes)
            or int(candidates[0]) < left
        )
        return None if due else (left, right)

    def refresh(self) -> tuple[str, Tensor]:
        length = len(self.tokens)
        dims = self.model.dimensions
        weight = self.model.weights["lm_head.weight"]

        def empty() -> Tensor:
            return weight.new_zeros((dims.num_kv_heads, length, dims.head_dim))

        self.stored = [StoredLayer(empty(), empty()) for _ in range(dims.num_layers)]
        masks = None
        if self.patterns is not None:
            assert self.sparse is not None
            masks = [token_mask(p, length, self.sparse.block_size) for p in self.patterns]
        logits, layers = self.model.logits(self.tokens, masks, self.stored)
        if self.patterns is not None:
            return "sparse", logits
        if self.sparse is None or not self.patterns_due(self.sparse):
            return "dense", logits
        self.patterns = [block_pattern(layer, self.canvas_len, self.sparse) for layer in layers]
        return "build", logits

    def patterns_due(self, sparse: SparseSettings) -> bool:
        if self.pace.value is None:
            return self.step >= int(self.pace.steps * sparse.skip) + 1
        decided = int((self.tokens[self.prompt_len :] != self.mask_id).sum())
        return bool(self.passes) and decided >= self.canvas_len * sparse.skip

    def window_masks(self, left: int, right: int) -> list[Tensor]:
        """Per layer bool [heads, rows, L]: the listed blocks and those that the window touches."""
        assert self.patterns is not None and self.sparse is not None
        size = self.sparse.block_size
        row_blocks = torch.arange(left, right) // size
        result = []
        for pattern in self.patterns:
            kept = pattern[:, row_blocks].clone()
            kept[:, :, left // size : (right - 1) // size + 1] = True
            result.append(kept.repeat_interleave(size, dim=2)[:, :, : len(self.tokens)])
        return result

    def decide(self, logits: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """Indices (ascending) of the candidates decided, and every candidate's proposed token."""
        probabilities = logits.softmax(dim=-1)
        best = probabilities.topk(2, dim=-1)
        confidence, tokens = best.values[:, 0], best.indices[:, 0]
        entropy = -torch.xlogy(probabilities, probabilities).sum(dim=-1)
        alg, value = self.pace.alg, self.pace.value
        if count is not None:
            if alg == "topk_margin":
                confidence = best.values[:, 0] - best.values[:, 1]
            if alg == "entropy":
                confidence = -entropy
            order = confidence.sort(descending=True, stable=True).indices
        elif alg.startswith("entropy"):
            assert value is not None
            ranked, order = entropy.sort(stable=True)
            if alg == "entropy_bound":
                count = int((ranked.cumsum(0) - ranked <= value).sum())
            else:
                count = int((ranked < value).sum())
        else:
            assert value is not None
            ranked, order = confidence.sort(descending=True, stable=True)
            if alg == "threshold":
                count = int((ranked >= value).sum())
            else:
                ranks = torch.arange(1, len(ranked) + 1, dtype=ranked.dtype)
                passes = ranked >= 1 - value / (ranks + 1)
                passes[0] = True
                count = int(passes.long().cumprod(0).sum())
                if self.pace.last_rank and count == len(ranked) - 1:
                    count += 1
        return order[: max(1, count)].sort().values, tokens
