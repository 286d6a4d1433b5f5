"""The plain PyTorch loops against the simplest form of the same."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import ModelConfig

from benchmarks.engine.denoising_engine import SHAPES
from benchmarks.reference.generate import Request, generate_dream, generate_llada
from benchmarks.reference.models import Dimensions, LayerAttention, ReferenceModel, llada_name
from benchmarks.reference.sparse_pattern import SparseSequence, SparseSettings
from benchmarks.reference.sparse_pattern import block_pattern as reference_pattern
from benchmarks.requests import plain_loop
from benchmarks.requests.plain_loop import SparseAttention, block_pattern, denoise
from benchmarks.requests.plain_model import PlainModel, dense_attention
from benchmarks.requests.plain_steps import (
    Measurement,
    PlainRequest,
    WrongLogitsError,
    check_plain,
)
from benchmarks.requests.random_model import random_weights, read_config, tensor_shapes
from tests.models import checkpoints
from tests.models.checkpoints import ILLADA, LLADA_MOE
from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.special_tokens import set_special_tokens
from vllm_sparsed.plugin import register

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = ("llada-mha", "dream-gqa")
SETTINGS = SparseSettings(skip=0.2, select=0.3, block_size=16)


def load(model: str) -> ReferenceModel:
    return ReferenceModel.load(GOLDEN / model, torch.float32)


@pytest.mark.parametrize("model", MODELS)
def test_random_weights_have_the_checkpoints_shapes(model: str) -> None:
    config = json.loads((GOLDEN / model / "config.json").read_text())
    expected = {name: tuple(tensor.shape) for name, tensor in load(model).weights.items()}
    assert tensor_shapes(config) == expected
    weights = random_weights(config, torch.float32, "cpu")
    assert (weights["model.norm.weight"] == 1).all()
    assert weights["lm_head.weight"].std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("model", MODELS)
def test_dense_logits(model: str) -> None:
    reference = load(model)
    tokens = torch.arange(20, 97)
    plain = PlainModel(reference.dimensions, reference.weights)
    torch.testing.assert_close(
        plain.logits(tokens, dense_attention), reference.logits(tokens)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("config", [ILLADA, LLADA_MOE], ids=lambda c: c["architectures"][0])
def test_dense_logits_of_further_models(config: dict[str, Any]) -> None:
    weights = {name: tensor.float() for name, tensor in checkpoints.random_weights(config).items()}
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    reference = ReferenceModel(Dimensions.from_config(config), weights)
    tokens = torch.arange(20, 97)
    plain = PlainModel(reference.dimensions, weights)
    torch.testing.assert_close(
        plain.logits(tokens, dense_attention), reference.logits(tokens)[0], rtol=1e-4, atol=1e-4
    )
    drawn = random_weights(dict(config), torch.float32, "cpu")
    assert drawn.keys() == weights.keys()
    tied = drawn["lm_head.weight"] is drawn["model.embed_tokens.weight"]
    assert tied == config["tie_word_embeddings"]


@pytest.mark.parametrize("shape", sorted(path.name for path in SHAPES.iterdir()))
def test_shapes_are_configurations_that_are_served(shape: str) -> None:
    register()
    config = ModelConfig(str(SHAPES / shape), skip_tokenizer_init=True)
    check_supported(config.hf_config)
    set_special_tokens(config)
    values = read_config(SHAPES / shape)
    sizes = [math.prod(sizes) for sizes in tensor_shapes(values).values()]
    billions = {"llada-8b": 8.0, "dream-7b": 7.6, "llada-moe-7b": 7.36, "illada-8b": 7.6}
    assert sum(sizes) / 1e9 == pytest.approx(billions[shape], rel=0.01)


@pytest.mark.parametrize("length", [63, 128, 200])
@pytest.mark.parametrize("rows_bytes", [1, 2**29])
def test_patterns_do_not_depend_on_how_many_rows_are_done_at_once(
    length: int, rows_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_loop, "ROWS_BYTES", rows_bytes)
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(4, length, 16, generator=generator)
    k = torch.randn(2, length, 16, generator=generator)
    expected = reference_pattern(LayerAttention(q, k), 50, SETTINGS)
    assert torch.equal(block_pattern(q, k, 50, SETTINGS), expected)


@pytest.mark.parametrize("model", MODELS)
def test_sparse_logits(model: str) -> None:
    """Blocks of 16 in FlexAttention's of 128, a length that is no multiple of either."""
    reference = load(model)
    dims, canvas = reference.dimensions, 40
    tokens = torch.arange(20, 197)
    sequence = SparseSequence(reference, canvas, 10, SETTINGS)
    sequence.logits(tokens, 3)
    plain = PlainModel(dims, reference.weights)
    attention = SparseAttention(canvas, SETTINGS)
    plain.logits(tokens, attention.dense_and_build)
    assert sequence.patterns is not None
    for built, expected in zip(attention.patterns, sequence.patterns, strict=True):
        assert torch.equal(built, expected)
    torch.testing.assert_close(
        plain.logits(tokens, attention.sparse), sequence.logits(tokens, 4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("model", MODELS)
def test_a_step_decides_what_the_reference_loop_decides(model: str) -> None:
    reference = load(model)
    dims = reference.dimensions
    prompt = torch.arange(30, 60)
    request = Request(
        lambda: SparseSequence(reference, 16, 4), prompt, 16, dims.mask_token_id, dims.logit_shift
    )
    if dims.logit_shift:
        step = generate_dream(request, steps=4, alg="maskgit_plus")[0]
    else:
        step = generate_llada(request, steps=4, block_length=16)[0]
    expected = step.before.clone()
    expected[list(step.positions)] = torch.tensor(step.tokens)
    plain = PlainModel(dims, reference.weights)
    after = denoise(plain, step.before, len(prompt), len(step.positions), dense_attention)
    assert after.tolist() == expected.tolist()


@pytest.mark.parametrize("model", MODELS)
def test_the_check_passes_and_can_fail(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(model)
    plain = PlainModel(reference.dimensions, reference.weights)
    assert check_plain(plain, SETTINGS) < 1e-5
    monkeypatch.setattr(
        SparseAttention, "sparse", lambda self, layer, q, k, v: dense_attention(layer, q, k, v)
    )
    with pytest.raises(WrongLogitsError, match="sparse logits"):
        check_plain(plain, SETTINGS)


def test_measuring_counts_what_was_asked_for() -> None:
    config = json.loads((GOLDEN / "llada-mha" / "config.json").read_text())
    weights = random_weights(config, torch.float32, "cpu")
    what = Measurement(80, 32, SETTINGS, dense_steps=3, sparse_steps=2, pattern_layers=1)
    request = PlainRequest(PlainModel(Dimensions.from_config(config), weights), what)
    dense = request.dense()
    assert dense.measured == "3 dense"
    sparse = request.sparse()
    assert sparse.measured == "3 dense, 1 building, 2 sparse"
    assert sparse.median("dense") == dense.median("dense")
    assert "1 of 2 layers" in sparse.note
    # 5 blocks, 2 of them generated: int(5 * 0.3) + 1 of all, less those generated, and 1 of those.
    assert sparse.density is not None and 1 / 5 <= sparse.density <= 3 / 5
    assert sparse.median("building") >= sparse.median("dense")


def test_names_in_checkpoints() -> None:
    """Random weights are given to vLLM under a checkpoint's names."""
    from safetensors import safe_open

    config = json.loads((GOLDEN / "llada-mha" / "config.json").read_text())
    with safe_open(GOLDEN / "llada-mha" / "model.safetensors", "pt") as file:
        assert {llada_name(name) for name in tensor_shapes(config)} == set(file.keys())


def test_dimensions_of_the_released_shapes() -> None:
    shapes = GOLDEN.parents[1] / "benchmarks" / "shapes"
    sizes = {}
    for name in ("llada-8b", "dream-7b"):
        config = json.loads((shapes / name / "config.json").read_text())
        Dimensions.from_config(config)
        sizes[name] = sum(torch.Size(s).numel() for s in tensor_shapes(config).values())
    assert sizes == {"llada-8b": 8_015_581_184, "dream-7b": 7_615_616_512}
