"""What is served and what is refused by name come from the registry's rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils.config import _CONFIG_REGISTRY

from vllm_sparsed import plugin
from vllm_sparsed.models import checkpoint_config
from vllm_sparsed.models.registry import ENTRIES, MODELS, UNSERVED


@pytest.fixture(scope="module", autouse=True)
def _plugin() -> None:
    plugin.register()


def refusal(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vllm_sparsed") as error:
        ModelConfig(str(folder), skip_tokenizer_init=True)
    # pydantic adds lines of its own around it.
    (line,) = [line for line in str(error.value).splitlines() if "vllm_sparsed" in line]
    return line


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.architecture)
def test_rows_lead_to_classes(entry: Any) -> None:
    config_class = getattr(checkpoint_config, entry.config_class)
    assert config_class.model_type == entry.model_type
    assert _CONFIG_REGISTRY[entry.model_type] is config_class
    for name in (entry.architecture, *entry.aliases):
        assert MODELS[name] is entry
        assert name in ModelRegistry.get_supported_archs()


UNSERVED_CASES = [
    (model_type, architecture)
    for model in UNSERVED
    for model_type in model.model_types
    for architecture in model.architectures
]


@pytest.mark.parametrize(("model_type", "architecture"), UNSERVED_CASES)
def test_known_models_are_refused_in_one_line(
    model_type: str, architecture: str, tmp_path: Path
) -> None:
    remote = {"AutoConfig": "configuration.Config"}
    line = refusal(tmp_path, model_type=model_type, architectures=[architecture], auto_map=remote)
    (model,) = [model for model in UNSERVED if architecture in model.architectures]
    assert model.refusal in line
    assert model.reason in line and model.served_by in line


@pytest.mark.parametrize(
    ("model_type", "architecture", "served"),
    [
        ("llada", "LLaDAFastDLLMModelLM", "Fast-dLLM's LLaDA is not served"),
        ("llada", "LLaDAMoEv2ModelLM", "LLaDA-MoE-v2 is not served"),
        ("llada", "LLaDASomethingLM", "of this type these are: LLaDAModelLM"),
        ("Dream", "DreamSomething", "of this type these are: DreamModel"),
    ],
)
def test_other_architectures_of_our_model_types(
    model_type: str, architecture: str, served: str, tmp_path: Path
) -> None:
    line = refusal(tmp_path, model_type=model_type, architectures=[architecture])
    assert served in line


def test_what_vllm_serves_itself_is_left_alone() -> None:
    (gemma,) = [model for model in UNSERVED if model.name == "DiffusionGemma"]
    supported = ModelRegistry.get_supported_archs()
    assert set(gemma.architectures) <= set(supported)
    assert not gemma.model_types
    refused = {name for model in UNSERVED for name in model.architectures} - {*gemma.architectures}
    assert not refused & set(supported)


def test_another_model_plugin_may_serve_what_is_refused_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Entry:
        value = "dllm_plugin:register"

    monkeypatch.setattr(plugin, "entry_points", lambda group: [Entry])
    for model_type in checkpoint_config.UNSERVED_CONFIGS:
        monkeypatch.delitem(_CONFIG_REGISTRY, model_type, raising=False)
    plugin.register()
    assert not set(checkpoint_config.UNSERVED_CONFIGS) & set(_CONFIG_REGISTRY)
    assert "llada" in _CONFIG_REGISTRY
