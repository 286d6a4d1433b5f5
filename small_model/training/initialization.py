"""Weights to start from: heads that look at neighbours, copy, and find equal words or nothing.

To answer from a document a model must learn that a value belongs to the words a few places before
it, then that equal words match; until both are there neither pays, and from random weights that
took from thousands of steps to forever (benchmarks/notes/small-model.md). In the manner of mimetic
initialisation (Trockman and Kolter, arXiv 2305.09828) both are given roughly; where to look, what
to copy and what to answer is learnt. Large models also have a place for the attention of a head
that finds nothing, the first token (Xiao et al., arXiv 2309.17453); so short a training does not
make one, and then it spreads over all of the document.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch

from small_model.training.model import Model

EMBEDDING_STD: Final = 0.02
WINDOWS: Final = ((-1, 0), (-3, 1), (-8, 2), (2, 1))
"""Of each head of the first layer: where it looks at first, in tokens from the query, and how many
of the highest rotary frequencies it leaves out: the more, the wider its window."""

SHARPNESS: Final = 6.0
"""Largest attention score that position alone makes at first."""

FREQUENCIES: Final = 12
"""Rotary frequencies that make it: lower ones hardly tell neighbours apart."""

MATCH_SCORE: Final = 10.0
"""Attention score of a token and one with the same content, in all layers but the first."""

SINK_SCORE: Final = 10.0
"""Attention score of any token and the first one of the text, in the same layers."""

MATCHING_FROM: Final = 12
"""Rotary frequencies left out of the match: they turn within a few tokens."""

SINK_FREQUENCIES: Final = 4
"""The lowest ones, which hardly turn within a text: those of the sink, left out of the match."""

MATCHING_LAYERS: Final = 3
"""Layers, counted from the first, of which every head matches; of later ones every second does."""

COPY_GAINS: Final = (0.25, 0.15)
"""Of values and of outputs, in the first and in later layers: what a head hands on of a token."""


@torch.no_grad()
def shape_attention(model: Model, first_token: int) -> None:
    """Let the first layer's heads attend to neighbours and the others' to equal content.

    Where nothing is equal the latter attend to the first token.

    Every embedding gets the same constant part, as large as its random one (to a tied head it adds
    the same to all logits, which changes nothing). Position is scored on that part, content on
    everything but it.

    Args:
        model: on the CPU; random numbers are PyTorch's.
        first_token: with which every text begins.
    """
    model.wte.add_(EMBEDDING_STD)
    for layer in range(model.shape.n_layers):
        _copy_content(model, layer)
        if layer:
            _match_content(model, layer)
            _look_at_first(model, layer, first_token)
        else:
            _look_nearby(model)


@torch.no_grad()
def align_forms(model: Model, pairs: Sequence[tuple[int, int]]) -> None:
    """Let a word and the same word after a space start as one embedding and a common difference.

    Args:
        model: whose embedding is changed; on the CPU.
        pairs: tokens of the word alone and after a space.
    """
    generator = torch.Generator().manual_seed(len(pairs))
    width = model.shape.d_model
    difference = torch.randn(width, generator=generator) * EMBEDDING_STD / 2
    for alone, after_space in pairs:
        shared = model.wte[after_space].clone()
        model.wte[alone] = shared + difference
        model.wte[after_space] = shared - difference


def _look_nearby(model: Model) -> None:
    """Queries and keys get what rotary embedding turns into a score of the distance."""
    shape = model.shape
    head_dim = shape.d_model // shape.n_heads
    half = head_dim // 2
    # The constant part is one of two equal parts of an embedding; norms make that sqrt(width / 2)
    # along a unit vector, of which each element of a row here takes up its share.
    share = 1.0 / (math.sqrt(shape.d_model / 2) * math.sqrt(shape.d_model))
    query, key = (model.get_parameter(f"blocks.0.{name}_proj.weight") for name in "qk")
    for head in range(shape.n_heads):
        offset, first = WINDOWS[head % len(WINDOWS)]
        chosen = torch.arange(first, min(first + FREQUENCIES, half))
        angles = offset / shape.rope_theta ** (chosen / half)
        size = math.sqrt(SHARPNESS * math.sqrt(head_dim) / len(chosen)) * share
        rows = head * head_dim + chosen
        query[rows] += size * torch.cos(angles)[:, None]
        query[rows + half] += size * torch.sin(angles)[:, None]
        key[rows] += size


def _copy_content(model: Model, layer: int) -> None:
    """Heads hand on what they see: each its own part of an orthogonal basis, there and back."""
    width = model.shape.d_model
    gain = COPY_GAINS[min(layer, 1)]
    basis, _ = torch.linalg.qr(torch.randn(width, width))
    model.get_parameter(f"blocks.{layer}.v_proj.weight").copy_(_varying(basis) * gain)
    model.get_parameter(f"blocks.{layer}.attn_out.weight").copy_(basis.T * gain)


def _match_content(model: Model, layer: int) -> None:
    """Queries and keys of one projection: a token scores highest with its like."""
    shape = model.shape
    head_dim = shape.d_model // shape.n_heads
    half = head_dim // 2
    slow = torch.arange(min(MATCHING_FROM, half // 2), half - SINK_FREQUENCIES)
    dims = torch.cat((slow, slow + half))
    std = math.sqrt(MATCH_SCORE * math.sqrt(head_dim) / (len(dims) * shape.d_model))
    query, key = (model.get_parameter(f"blocks.{layer}.{name}_proj.weight") for name in "qk")
    every = 1 if layer < MATCHING_LAYERS else 2
    for head in range(0, shape.n_heads, every):
        projection = _varying(torch.randn(len(dims), shape.d_model) * std)
        query[head * head_dim + dims] = projection
        key[head * head_dim + dims] = projection


def _look_at_first(model: Model, layer: int, first_token: int) -> None:
    """All queries score the first token's own direction."""
    shape = model.shape
    head_dim = shape.d_model // shape.n_heads
    half = head_dim // 2
    content = _varying(model.wte[first_token][None])[0]
    direction = content / content.norm()
    # As in `_look_nearby`: what norms make of the constant part and of the random one.
    size = math.sqrt(SINK_SCORE * math.sqrt(head_dim)) / math.sqrt(shape.d_model / 2)
    query, key = (model.get_parameter(f"blocks.{layer}.{name}_proj.weight") for name in "qk")
    for head in range(shape.n_heads):
        rows = head * head_dim + torch.arange(half - SINK_FREQUENCIES, half)
        share = size / math.sqrt(SINK_FREQUENCIES)
        query[rows] = share / math.sqrt(shape.d_model)
        query[rows + half] = 0.0
        key[rows] = share * direction
        key[rows + half] = 0.0


def _varying(rows: torch.Tensor) -> torch.Tensor:
    """Rows that take up nothing of the constant part."""
    return rows - rows.mean(dim=1, keepdim=True)
