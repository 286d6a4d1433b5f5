"""Weights in the formats that people have them in, on CPUs: right logits, or a refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reference.models import ReferenceModel
from tests.models import quantized
from tests.models.checkpoints import LLADA_MOE, reference, write_checkpoint
from tests.models.loading import LoadedModel
from tests.models.quantized import compressed_tensors, quantize_checkpoint
from tests.models.test_forward import GOLDEN, assert_as_exact_as_pytorch, sequences

pytestmark = pytest.mark.usefixtures("parallel_groups")

MODELS = pytest.mark.parametrize("model", ["llada-mha", "dream-gqa"])
EMBEDDING = {"llada-mha": "transformer.wte", "dream-gqa": "embed_tokens"}
HEAD = {"llada-mha": "model.transformer.ff_out", "dream-gqa": "lm_head"}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": quantized.GROUP,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
    "checkpoint_format": "gptq",
}
AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": quantized.GROUP,
    "zero_point": True,
    "version": "gemm",
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


class QuantizedInputs(ReferenceModel):
    """Plain PyTorch that rounds the inputs of quantized layers as W8A8 kernels do."""

    kind = "int8"

    def _linear(self, x: Tensor, name: str) -> Tensor:
        if name != "lm_head":
            most = 127 if self.kind == "int8" else 448
            scales = x.float().abs().amax(dim=-1, keepdim=True) / most
            rounded = x.float() / scales
            rounded = rounded.round() if most == 127 else rounded.to(torch.float8_e4m3fn).float()
            x = (rounded * scales).to(x.dtype)
        return super()._linear(x, name)


def assert_close(loaded: LoadedModel, plain: ReferenceModel, exact: ReferenceModel) -> None:
    """Errors against `exact`, on average and at most, are within twice those of `plain`."""
    expected = torch.cat([exact.logits(tokens)[0] for tokens in sequences()])
    usual = (torch.cat([plain.logits(tokens)[0] for tokens in sequences()]) - expected).abs()
    error = (torch.cat(loaded.logits(sequences())) - expected).abs()
    assert error.mean() <= 2 * usual.mean()
    assert error.max() <= 2 * usual.max()
    assert 3 * usual.mean() < expected.abs().mean()


@MODELS
@pytest.mark.parametrize(
    ("form", "listed"),
    [("gptq", False), ("awq", False), ("awq", True), ("int4_packed", True)],
    ids=["gptq", "awq", "awq-with-modules-not-converted", "compressed-tensors-int4"],
)
def test_four_bits(model: str, form: str, listed: bool, tmp_path: Path) -> None:
    config: dict[str, Any] = GPTQ if form == "gptq" else AWQ
    skip = [EMBEDDING[model], HEAD[model]]
    if form == "int4_packed":
        config = compressed_tensors(form, [HEAD[model]])
    elif listed:
        # A layer that stays as it is, by its name in the checkpoint.
        kept = {
            "llada-mha": "model.transformer.blocks.1.attn_out",
            "dream-gqa": "model.layers.1.self_attn.o_proj",
        }[model]
        config = {**config, "modules_to_not_convert": [HEAD[model], kept]}
        skip.append(kept)
    folder, plain = quantize_checkpoint(
        GOLDEN / model, tmp_path, getattr(quantized, form), config, tuple(skip)
    )
    loaded = LoadedModel(folder, dtype="bfloat16")
    assert_close(loaded, reference(plain, torch.bfloat16), reference(plain, torch.float64))


@MODELS
@pytest.mark.parametrize("form", ["int8", "float8"])
def test_compressed_tensors_of_eight_bits(model: str, form: str, tmp_path: Path) -> None:
    folder, plain = quantize_checkpoint(
        GOLDEN / model,
        tmp_path,
        getattr(quantized, form),
        compressed_tensors(form, [HEAD[model]]),
        (EMBEDDING[model], HEAD[model]),
    )
    rounding = QuantizedInputs.load(plain, torch.bfloat16)
    assert isinstance(rounding, ReferenceModel)
    rounding = QuantizedInputs(rounding.dimensions, rounding.weights)
    rounding.kind = form
    loaded = LoadedModel(folder, dtype="bfloat16")
    assert_close(loaded, rounding, reference(plain, torch.float64))


@MODELS
def test_missing_scales_are_named(model: str, tmp_path: Path) -> None:
    folder, _ = quantize_checkpoint(
        GOLDEN / model, tmp_path, quantized.gptq, GPTQ, (EMBEDDING[model], HEAD[model])
    )
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("v_proj.scales"))
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors .*: {name}"):
        LoadedModel(folder, dtype="bfloat16")


@MODELS
@pytest.mark.parametrize(
    ("options", "config", "message"),
    [
        ({"quantization": "fp8"}, None, "quantization fp8.* is not supported on CPUs.*GPTQ, AWQ"),
        ({}, FP8, "quantization fp8 is not supported on CPUs"),
        ({"quantization": "bitsandbytes"}, None, "bitsandbytes"),
        ({}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ],
    ids=["fp8-online", "fp8-checkpoint", "bitsandbytes-online", "bitsandbytes-checkpoint"],
)
def test_refused_by_name(
    model: str, options: dict[str, Any], config: Any, message: str, tmp_path: Path
) -> None:
    values = json.loads((GOLDEN / model / "config.json").read_text())
    if config is not None:
        values["quantization_config"] = config
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        LoadedModel(tmp_path, dtype="bfloat16", load_format="dummy", **options)


def test_quantized_experts_are_refused_on_cpus(tmp_path: Path) -> None:
    config = {**LLADA_MOE, "quantization_config": compressed_tensors("int8", ["lm_head"])}
    folder = write_checkpoint(tmp_path, config)
    with pytest.raises(ValueError, match=r"quantized experts .compressed-tensors. are not support"):
        LoadedModel(folder, dtype="bfloat16")


@MODELS
@pytest.mark.parametrize(
    ("form", "load_format"),
    [
        ("sharded", "auto"),
        ("sharded", "safetensors"),
        ("pytorch_model.bin", "auto"),
        ("x.pt", "pt"),
    ],
)
def test_files(model: str, form: str, load_format: str, tmp_path: Path) -> None:
    """Several safetensors files with an index, and PyTorch's own files."""
    weights = load_file(GOLDEN / model / "model.safetensors")
    (tmp_path / "config.json").write_text((GOLDEN / model / "config.json").read_text())
    if form != "sharded":
        torch.save(weights, tmp_path / form)
    else:
        names = sorted(weights, reverse=True)
        index = {}
        for number in range(3):
            file = f"model-0000{number + 1}-of-00003.safetensors"
            part = {name: weights[name] for name in names[number::3]}
            save_file(part, tmp_path / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
        text = json.dumps({"metadata": {}, "weight_map": index})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    loaded = LoadedModel(tmp_path, load_format=load_format)
    assert_as_exact_as_pytorch(GOLDEN / model, loaded, torch.float32)
