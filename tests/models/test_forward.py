"""vLLM's models compute what the plain PyTorch ones do, on the golden checkpoints' weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.reference.models import ReferenceModel
from tests.models.loading import LoadedModel
from vllm_sparsed.models.bidirectional_attention import BidirectionalAttention

pytestmark = pytest.mark.usefixtures("parallel_groups")

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
MODELS = pytest.mark.parametrize("name", ["llada-mha", "dream-gqa"])
LENGTHS = (1, 63, 150)


def sequences(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 384, (length,), generator=generator) for length in LENGTHS]


def assert_as_exact_as_pytorch(folder: Path, loaded: LoadedModel, dtype: torch.dtype) -> None:
    """The largest error against float64 is at most twice that of the plain model in `dtype`."""
    exact, plain = (ReferenceModel.load(folder, kind) for kind in (torch.float64, dtype))
    expected = torch.cat([exact.logits(tokens)[0] for tokens in sequences()])
    usual_error = (torch.cat([plain.logits(tokens)[0] for tokens in sequences()]) - expected).abs()
    logits = torch.cat(loaded.logits(sequences()))
    assert logits.dtype == dtype
    error = (logits - expected).abs()
    assert error.max() <= 2 * usual_error.max()
    assert error.mean() <= 2 * usual_error.mean()
    # The bound itself is far below the logits.
    assert 20 * usual_error.mean() < expected.abs().mean()


@MODELS
def test_float32(name: str) -> None:
    assert_as_exact_as_pytorch(GOLDEN / name, LoadedModel(GOLDEN / name), torch.float32)


@MODELS
@pytest.mark.parametrize("backend", ["sparsed", "CPU_ATTN"])
def test_backends(name: str, backend: str, tmp_path: Path) -> None:
    # CPU_ATTN has no heads of 16: the same weights, read as heads of 32.
    llada = {"n_heads": 8, "n_kv_heads": 8}
    dream = {"num_attention_heads": 4, "num_key_value_heads": 1}
    folder = copy_checkpoint(name, tmp_path, config=llada if name == "llada-mha" else dream)
    assert_as_exact_as_pytorch(folder, LoadedModel(folder, backend), torch.float32)


@MODELS
def test_bfloat16(name: str) -> None:
    loaded = LoadedModel(GOLDEN / name, dtype="bfloat16")
    assert_as_exact_as_pytorch(GOLDEN / name, loaded, torch.bfloat16)


@MODELS
@pytest.mark.parametrize("pages", [True, False])
def test_attention_layers(name: str, pages: bool) -> None:
    config = {"diffusion": {"kv_reuse_pages": pages}}
    loaded = LoadedModel(GOLDEN / name, load_format="dummy", additional_config=config)
    layers = [m for m in loaded.model.modules() if isinstance(m, BidirectionalAttention)]
    assert [layer.layer_index for layer in layers] == [0, 1]
    assert [layer.layer_name for layer in layers] == [
        f"model.layers.{index}.self_attn.attn" for index in range(2)
    ]
    for layer in layers:
        spec = layer.get_kv_cache_spec(loaded.vllm_config)
        assert (spec is not None) == pages
        assert spec is None or (spec.block_size, spec.non_causal) == (128, True)
    assert all(layer.attn_backend.get_name() == "SPARSED" for layer in layers)
    assert loaded.logits(sequences())[1].isfinite().all()


@pytest.mark.parametrize("name", ["llada-mha", "dream-gqa"])
def test_tied_embeddings(name: str, tmp_path: Path) -> None:
    folder = copy_checkpoint(
        name,
        tmp_path,
        drop=("model.transformer.ff_out.weight", "lm_head.weight"),
        config={"weight_tying" if name == "llada-mha" else "tie_word_embeddings": True},
    )
    loaded = LoadedModel(folder)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert_as_exact_as_pytorch(folder, loaded, torch.float32)


def test_llada_with_query_key_and_value_biases(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    biases = {
        f"model.transformer.blocks.{layer}.{name}_proj.bias": torch.randn(256, generator=generator)
        for layer in range(2)
        for name in "qkv"
    }
    folder = copy_checkpoint("llada-mha", tmp_path, extra=biases, config={"include_qkv_bias": True})
    assert_as_exact_as_pytorch(folder, LoadedModel(folder), torch.float32)


def test_unknown_tensor_is_an_error(tmp_path: Path) -> None:
    extra = {"model.transformer.blocks.0.q_norm.weight": torch.ones(16)}
    folder = copy_checkpoint("llada-mha", tmp_path, extra=extra)
    with pytest.raises(ValueError, match="q_norm"):
        LoadedModel(folder)


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    folder = copy_checkpoint("dream-gqa", tmp_path, drop=("model.norm.weight",))
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        LoadedModel(folder)


def copy_checkpoint(
    name: str,
    folder: Path,
    drop: tuple[str, ...] = (),
    extra: dict[str, torch.Tensor] | None = None,
    config: Mapping[str, object] = MappingProxyType({}),
) -> Path:
    """A golden checkpoint with some tensors and settings changed."""
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    kept = {key: tensor for key, tensor in weights.items() if key not in drop}
    save_file({**kept, **(extra or {})}, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder
