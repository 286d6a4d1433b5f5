"""Loads a checkpoint through vLLM's loader and runs it, without an engine."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.model_loader import get_model_loader

from vllm_sparsed.worker.packing import BatchPacker


class LoadedModel:
    """A model of this package on the CPU."""

    def __init__(self, folder: Path, backend: str = "sparsed", **arguments: Any) -> None:
        """Load `folder`; `arguments` are EngineArgs'."""
        options = {"skip_tokenizer_init": True, "dtype": "float32", **arguments}
        self.vllm_config: VllmConfig = EngineArgs(
            str(folder), attention_backend=backend, **options
        ).create_engine_config()
        # vLLM's CPU worker replaces it too: PyTorch has no such call without an accelerator.
        with self.current(), patch("torch.accelerator.empty_cache"):
            self.model: Any = get_model_loader(self.vllm_config.load_config).load_model(
                vllm_config=self.vllm_config, model_config=self.vllm_config.model_config
            )

    def current(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = set_current_vllm_config(self.vllm_config)
        return context

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Tensor]) -> list[Tensor]:
        """Dense logits [L, vocabulary] of each sequence [L], run as one packed batch."""
        lengths = [len(tokens) for tokens in sequences]
        with self.current():
            packer = BatchPacker(self.vllm_config, None, torch.device("cpu"))
            positions, attention = packer.dense_batch(lengths)
            context = set_forward_context(
                attention, self.vllm_config, num_tokens=sum(lengths), slot_mapping={}
            )
            with context:
                hidden = self.model(input_ids=torch.cat(list(sequences)), positions=positions)
            logits: Tensor = self.model.compute_logits(hidden)
        return list(logits.split(lengths))
