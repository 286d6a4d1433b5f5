"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register` in every process it starts, possibly more than once. It only enters names in
vLLM's tables, with the checkpoints' configurations and tokenizer; models, kernels and the engine's
parts are imported when an engine of a diffusion model is configured.
"""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

BACKEND_NAME: Final = "SPARSED"
BACKEND_CLASS: Final = "vllm_sparsed.attention.backend.SparsedAttentionBackend"

MODELS: Final = {
    "LLaDAModelLM": "vllm_sparsed.models.llada:LLaDAModelLM",
    "DreamModel": "vllm_sparsed.models.dream:DreamModel",
}

# The decoding algorithm of a request that names none: that of the family's own reference code.
DEFAULT_ALGORITHMS: Final = {"LLaDAModelLM": "low_confidence", "DreamModel": "origin"}


class DeferredEngineConfig:
    """vLLM's configuration hook of the diffusion models; imports the real one when called."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """As `engine_config.DiffusionEngineConfig`."""
        from vllm_sparsed.engine_config import DiffusionEngineConfig

        DiffusionEngineConfig.verify_and_update_config(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """The model's own configuration is used as it is."""


def restore_backend() -> Any:
    """The SPARSED member of vLLM's backend enum, entered first where this process lacks it.

    Enum members pickle by value, and a spawned process unpickles the engine's configuration before
    it loads plugins: the member is therefore pickled as a call of this function.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(BACKEND_NAME, BACKEND_CLASS)
        member = AttentionBackendEnum[BACKEND_NAME]
        # On the instance: the other members keep the enum's own way of pickling.
        member.__dict__["__reduce_ex__"] = _reduce_backend
    return AttentionBackendEnum[BACKEND_NAME]


def _reduce_backend(protocol: int) -> tuple[Any, tuple[()]]:
    return restore_backend, ()


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
    for architecture, path in MODELS.items():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, path)
        MODELS_CONFIG_MAP[architecture] = DeferredEngineConfig
