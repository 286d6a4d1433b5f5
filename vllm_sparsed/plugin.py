"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register` in every process it starts, possibly more than once. It only enters names in
vLLM's tables, with the checkpoints' configurations and tokenizer; models, kernels and the engine's
parts are imported when an engine of a diffusion model is configured.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm_sparsed.attention.registration import restore_backend
from vllm_sparsed.models.registry import ENTRIES, MODELS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

TEMPLATES: Final = Path(__file__).parent / "models" / "chat_templates"


class DeferredEngineConfig:
    """vLLM's configuration hook of the diffusion models; imports the real one when called."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """As `engine_config.DiffusionEngineConfig`."""
        from vllm_sparsed.config.engine import DiffusionEngineConfig

        DiffusionEngineConfig.verify_and_update_config(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """The model's own configuration is used as it is."""


def register() -> None:
    """Enter the attention backend, the models and their configurations in vLLM's tables."""
    from transformers import CONFIG_MAPPING
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.chat_templates.registry import (
        _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK,
    )
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_sparsed.models.checkpoint_config import CONFIGS, UNSERVED_CONFIGS
    from vllm_sparsed.models.dream_tokenizer import register_tokenizers

    restore_backend()
    register_tokenizers()
    _CONFIG_REGISTRY.update(CONFIGS)
    if not _other_model_plugins():
        # What vLLM or transformers know is theirs.
        for model_type, config_class in UNSERVED_CONFIGS.items():
            if model_type not in _CONFIG_REGISTRY and model_type not in CONFIG_MAPPING:
                _CONFIG_REGISTRY[model_type] = config_class
    supported = ModelRegistry.get_supported_archs()
    for architecture, entry in MODELS.items():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, entry.model_class)
        MODELS_CONFIG_MAP[architecture] = DeferredEngineConfig
    for entry in ENTRIES:
        if (
            entry.fallback_template
            and entry.model_type not in _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK
        ):
            path = TEMPLATES / entry.fallback_template
            _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK[entry.model_type] = path


def _other_model_plugins() -> bool:
    """Whether another package has a plugin of this kind: it may serve what is refused here."""
    packages = {
        entry.value.split(":")[0].split(".")[0]
        for entry in entry_points(group="vllm.general_plugins")
    }
    return bool(packages - {"vllm", "vllm_sparsed"})
