"""Weight files that lack tensors are refused, whichever they lack, with the checkpoint's names."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.models.loading import LoadedModel
from tests.models.test_forward import GOLDEN, copy_checkpoint
from vllm_sparsed.models.llada import LLaDAModelLM

pytestmark = pytest.mark.usefixtures("parallel_groups")

TENSORS = [
    (model, name)
    for model in ("llada-mha", "dream-gqa")
    for name in load_file(GOLDEN / model / "model.safetensors")
    # The others are of another layer.
    if ".1." not in name
]


@pytest.mark.parametrize(("model", "tensor"), TENSORS)
def test_a_missing_tensor_is_named(model: str, tensor: str, tmp_path: Path) -> None:
    folder = copy_checkpoint(model, tmp_path, drop=(tensor,))
    message = f"lack 1 tensors that config.json asks for: {tensor.replace('.', '[.]')}[.]"
    with pytest.raises(ValueError, match=message):
        LoadedModel(folder)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    dropped = tuple(name for name in load_file(GOLDEN / "llada-mha" / "model.safetensors"))[2:]
    folder = copy_checkpoint("llada-mha", tmp_path, drop=dropped)
    with pytest.raises(ValueError, match=f"lack {len(dropped)} tensors .* and .* more"):
        LoadedModel(folder)


def test_a_running_model_takes_some_tensors() -> None:
    loaded = LoadedModel(GOLDEN / "llada-mha")
    weights = load_file(GOLDEN / "llada-mha" / "model.safetensors")
    name = "model.transformer.ln_f.weight"
    assert loaded.model.load_weights([(name, weights[name] * 2)]) == {"model.norm.weight"}
    assert loaded.model.model.norm.weight.equal(weights[name].float() * 2)
    # Engines with dummy weights get theirs in parts from the start.
    dummy = LoadedModel(GOLDEN / "llada-mha", load_format="dummy")
    assert dummy.model.load_weights([(name, weights[name])]) == {"model.norm.weight"}


@pytest.mark.parametrize(
    ("listed", "mapped"),
    [
        ("model.transformer.ff_out", "lm_head"),
        ("model.transformer.wte", "model.embed_tokens"),
        ("model.transformer.blocks.3.q_proj", "model.layers.3.self_attn.q_proj"),
        ("model.transformer.blocks.3.ff_out", "model.layers.3.mlp.down_proj"),
        ("model.transformer.blocks.3", "model.layers.3"),
        ("attn_out", "self_attn.o_proj"),
        ("re:.*ff_proj$", "re:.*mlp.gate_proj$"),
        ("re:.*up_proj.*", "re:.*mlp.up_proj.*"),
        ("my_ff_proj", "my_ff_proj"),
    ],
)
def test_modules_that_quantizations_list(listed: str, mapped: str) -> None:
    mapper = LLaDAModelLM.hf_to_vllm_mapper.get_rename_mapper()
    assert mapper.apply_list([listed]) == [mapped]


@pytest.mark.parametrize("tensor", load_file(GOLDEN / "llada-mha" / "model.safetensors"))
def test_names_lead_back(tensor: str) -> None:
    mapper = LLaDAModelLM.hf_to_vllm_mapper.get_rename_mapper()
    assert LLaDAModelLM.checkpoint_name(mapper.apply_list([tensor])[0]) == tensor
