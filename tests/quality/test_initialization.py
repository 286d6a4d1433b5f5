"""What the model of a training begins with."""

import pytest
import torch
from torch.nn.functional import embedding, rms_norm

from small_model.training.initialization import (
    MATCHING_LAYERS,
    WINDOWS,
    align_forms,
    shape_attention,
)
from small_model.training.model import Model, Shape, _rotate

SHAPE = Shape(512, n_layers=4)
LENGTH, FIRST, MIDDLE = 256, 1, 128


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    model = Model(SHAPE)
    shape_attention(model, FIRST)
    return model


@torch.no_grad()
def attention(model: Model, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """Mean attention [heads, keys] of the middle query, the layer reading embeddings alone."""
    x = embedding(tokens, model.wte)
    cos, sin = model.cos[:LENGTH], model.sin[:LENGTH]
    block = model.blocks[layer]
    normed = rms_norm(x, x.shape[-1:], block.attn_norm, SHAPE.rms_norm_eps)
    query, key = (
        _rotate(projection(normed).unflatten(-1, (SHAPE.n_heads, -1)).transpose(1, 2), cos, sin)
        for projection in (block.q_proj, block.k_proj)
    )
    scores = query @ key.transpose(-1, -2) / 64**0.5
    return scores.softmax(-1)[:, :, MIDDLE].mean(0)


def random_tokens() -> torch.Tensor:
    """Texts of different tokens behind the first one."""
    tokens = torch.stack([torch.randperm(SHAPE.vocab_size - 2)[:LENGTH] + 2 for _ in range(16)])
    tokens[:, 0] = FIRST
    return tokens


def test_heads_of_the_first_layer_look_at_their_places(model: Model) -> None:
    torch.manual_seed(1)
    found = attention(model, 0, random_tokens())
    for weights, (offset, first) in zip(found, WINDOWS, strict=True):
        width = 1 + first
        place = MIDDLE + offset
        assert abs(int(weights.argmax()) - place) <= width
        near = slice(place - 2 * width, place + 2 * width + 1)
        assert weights[near].sum() > 4 * (near.stop - near.start) / LENGTH


@pytest.mark.parametrize("layer", range(1, SHAPE.n_layers))
def test_heads_of_later_layers_look_at_their_like_or_at_the_first(model: Model, layer: int) -> None:
    torch.manual_seed(2)
    tokens = random_tokens()
    tokens[:, MIDDLE + 60] = tokens[:, MIDDLE]
    found = attention(model, layer, tokens)
    others = found.clone()
    others[:, [0, MIDDLE, MIDDLE + 60]] = 0
    matching = range(SHAPE.n_heads) if layer < MATCHING_LAYERS else range(0, SHAPE.n_heads, 2)
    for head in range(SHAPE.n_heads):
        assert found[head, 0] > 20 * others[head].max()
        found_like = found[head, MIDDLE + 60] > 20 * others[head].max()
        assert bool(found_like) == (head in matching)


def test_the_constant_part_changes_no_choice(model: Model) -> None:
    torch.manual_seed(0)
    plain = Model(SHAPE)
    # The same is added to every logit.
    assert torch.allclose(model.wte - plain.wte, torch.tensor(0.02), atol=1e-7)
    assert torch.equal(model.blocks[1].ff_out.weight, plain.blocks[1].ff_out.weight)


def test_heads_copy_what_they_see(model: Model) -> None:
    """Value and output of all heads together give back the content, smaller."""
    for block in model.blocks:
        content = torch.randn(SHAPE.d_model)
        content -= content.mean()
        copied = block.attn_out(block.v_proj(content))
        assert torch.nn.functional.cosine_similarity(copied, content, dim=0) > 0.999
        assert 0.01 < copied.norm() / content.norm() < 0.1


def test_forms_of_a_word_differ_in_one_direction() -> None:
    torch.manual_seed(3)
    model = Model(Shape(64, n_layers=1))
    before = model.wte.detach().clone()
    align_forms(model, [(3, 10), (4, 11), (40, 20)])
    differences = [model.wte[a] - model.wte[b] for a, b in ((3, 10), (4, 11), (40, 20))]
    for difference in differences:
        assert torch.allclose(difference, differences[0], atol=1e-7)
        assert 0.8 < difference.norm() / before[10].norm() < 1.2
    assert torch.allclose(model.wte[3] + model.wte[10], 2 * before[10], atol=1e-7)
    untouched = [i for i in range(64) if i not in (3, 4, 40, 10, 11, 20)]
    assert torch.equal(model.wte[untouched], before[untouched])
