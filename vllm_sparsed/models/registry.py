"""The models that are served, a row each; nothing heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One architecture.

    Attributes:
        architecture: its name in config.json.
        model_class: `module:Class` of the implementation.
        algorithm: `diffusion_alg` of a request that names none: that of the family's own reference
            code.
        logit_shift: whether row p of the logits decides position p + 1.
    """

    architecture: str
    model_class: str
    algorithm: str
    logit_shift: bool = False


_ENTRIES: Final = (
    ModelEntry("LLaDAModelLM", "vllm_sparsed.models.llada:LLaDAModelLM", "low_confidence"),
    ModelEntry("DreamModel", "vllm_sparsed.models.dream:DreamModel", "origin", logit_shift=True),
)

MODELS: Final[Mapping[str, ModelEntry]] = MappingProxyType(
    {entry.architecture: entry for entry in _ENTRIES}
)
"""By architecture."""
