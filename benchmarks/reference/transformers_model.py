"""A checkpoint's own modelling code in transformers, as one sequence's forward pass."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TransformersSequence:
    """Dense forward passes of a model that `AutoModel` loaded; nothing is kept between steps."""

    model: Any

    def logits(self, tokens: Tensor, step: int) -> Tensor:
        """Logits [L, vocabulary] of the tokens [L], without Dream's shift."""
        logits: Tensor = self.model(tokens[None]).logits[0]
        return logits


def has_modelling_code(config: dict[str, Any], model: str) -> bool:
    """Whether config.json names modelling code that is there; on the Hub it is."""
    reference = config.get("auto_map", {}).get("AutoModel")
    if reference is None:
        return False
    folder = Path(model)
    return not folder.is_dir() or (folder / f"{reference.split('.')[0]}.py").is_file()


def load_transformers_model(model: str, dtype: torch.dtype, device: str) -> Any:
    """Load a model with its remote code, for inference."""
    from transformers import AutoModel

    loaded = AutoModel.from_pretrained(model, trust_remote_code=True, dtype=dtype)
    return loaded.to(device).eval()
