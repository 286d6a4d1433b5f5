"""Entry point of the vLLM plugin (group `vllm.general_plugins`).

vLLM calls `register` in every process it starts, possibly more than once, whatever model it serves.
It only enters names in vLLM's tables, with the checkpoints' configurations and tokenizer; models,
kernels and the engine's parts are imported when an engine of a diffusion model is configured. With
a vLLM that it does not know it registers nothing and says so, so that other models still start.
"""

import logging
import re
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import entry_points
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vllm_sparsed import __version__

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

SUPPORTED_VLLM: Final = ("0.32", "0.33")
"""Minor versions of vLLM that this release supports."""

TEMPLATES: Final = Path(__file__).parent / "models" / "chat_templates"


class DeferredEngineConfig:
    """vLLM's configuration hook of the diffusion models; imports the real one when called."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """As `config.engine.DiffusionEngineConfig`."""
        from vllm_sparsed.config.engine import DiffusionEngineConfig

        DiffusionEngineConfig.verify_and_update_config(vllm_config)

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """The model's own configuration is used as it is."""


def register() -> None:
    """Enter the attention backend, the models and their configurations in vLLM's tables.

    With another minor version of vLLM than `SUPPORTED_VLLM`, or one whose tables are not where they
    were, nothing is entered and one warning names both versions. Never raises an Exception.
    """
    version = "unknown"
    try:
        import vllm

        version = str(vllm.__version__)
        if _minor_version(version) not in SUPPORTED_VLLM:
            _warn(version, "that version is not supported")
            return
        undo: list[Callable[[], object]] = []
        try:
            _enter(undo)
        except Exception:
            for step in reversed(undo):
                with suppress(Exception):
                    step()
            raise
    # Whatever a changed vLLM raises: the other models of the installation must start.
    except Exception as error:
        _warn(version, f"{type(error).__name__}: {error}")


def _minor_version(version: str) -> str:
    """The first two numbers: 0.32 of 0.32.0+cpu."""
    found = re.match(r"\d+\.\d+", version)
    return found.group() if found else version


@cache
def _warn(version: str, reason: str) -> None:
    # Once for the processes of one server: its children share the fate of the first.
    level = logging.WARNING if parent_process() is None else logging.DEBUG
    # Not vllm_sparsed.logger, which needs vLLM's; below vLLM's loggers, whose handlers show it.
    logging.getLogger("vllm.vllm_sparsed.plugin").log(
        level,
        "vllm_sparsed %s (for vLLM %s) registers nothing with vLLM %s: %s. Other models are served "
        "as usual; LLaDA and Dream are not. Install a vLLM or a vllm_sparsed that fits the other.",
        __version__,
        " and ".join(SUPPORTED_VLLM),
        version,
        reason,
    )


def _enter(undo: list[Callable[[], object]]) -> None:
    """Enter everything; `undo` receives what takes each entry back."""
    from transformers import CONFIG_MAPPING
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.chat_templates.registry import (
        _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK,
    )
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_sparsed.attention.registration import BACKEND_NAME, restore_backend
    from vllm_sparsed.frontend import RENDERER_MODE
    from vllm_sparsed.models.checkpoint_config import CONFIGS, UNSERVED_CONFIGS
    from vllm_sparsed.models.dream_tokenizer import register_tokenizers
    from vllm_sparsed.models.registry import ENTRIES, MODELS

    def put(table: MutableMapping[str, Any], key: str, value: object) -> None:
        is_new = key not in table
        table[key] = value
        if is_new:
            undo.append(partial(table.pop, key, None))

    for model_type, config_class in CONFIGS.items():
        put(_CONFIG_REGISTRY, model_type, config_class)
    if not _other_model_plugins():
        # What vLLM or transformers know is theirs.
        for model_type, config_class in UNSERVED_CONFIGS.items():
            if model_type not in _CONFIG_REGISTRY and model_type not in CONFIG_MAPPING:
                put(_CONFIG_REGISTRY, model_type, config_class)
    supported = ModelRegistry.get_supported_archs()
    for architecture, entry in MODELS.items():
        if architecture not in supported:
            undo.append(partial(ModelRegistry.models.pop, architecture, None))
            ModelRegistry.register_model(architecture, entry.model_class)
        put(MODELS_CONFIG_MAP, architecture, DeferredEngineConfig)
    for entry in ENTRIES:
        if entry.fallback_template:
            path = TEMPLATES / entry.fallback_template
            if entry.model_type not in _MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK:
                put(_MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK, entry.model_type, path)
    put(TokenizerRegistry.tokenizers, RENDERER_MODE, TokenizerRegistry.tokenizers["hf"])
    renderer = ("vllm_sparsed.frontend.renderer", "MaskedDiffusionRenderer")
    put(RENDERER_REGISTRY.renderers, RENDERER_MODE, renderer)
    # Last, as they cannot be taken back; an unused name in the enum changes nothing.
    restore_backend()
    if BACKEND_NAME not in AttentionBackendEnum.__members__:
        raise LookupError(f"vLLM's table of attention backends did not take {BACKEND_NAME}")
    register_tokenizers()


def _other_model_plugins() -> bool:
    """Whether another package has a plugin of this kind: it may serve what is refused here."""
    packages = {
        entry.value.split(":")[0].split(".")[0]
        for entry in entry_points(group="vllm.general_plugins")
    }
    return bool(packages - {"vllm", "vllm_sparsed"})
