"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register` in every process it starts, possibly more than once. It only enters names in
vLLM's tables, with the checkpoints' configurations and tokenizer; models, kernels and the engine's
parts are imported when an engine of a diffusion model is configured.
"""

from typing import TYPE_CHECKING

from vllm_sparsed.attention.registration import restore_backend
from vllm_sparsed.models.registry import MODELS

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


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
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_sparsed.models.checkpoint_config import DreamConfig, LLaDAConfig
    from vllm_sparsed.models.dream_tokenizer import register_tokenizers

    restore_backend()
    register_tokenizers()
    for config_class in (LLaDAConfig, DreamConfig):
        _CONFIG_REGISTRY[config_class.model_type] = config_class
    supported = ModelRegistry.get_supported_archs()
    for architecture, entry in MODELS.items():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, entry.model_class)
        MODELS_CONFIG_MAP[architecture] = DeferredEngineConfig
