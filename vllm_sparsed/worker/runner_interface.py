"""What vLLM's worker asks of a model runner, where denoising has little or nothing to answer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.tasks import SupportedTask
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


class RunnerInterface:
    """The attributes and methods that vLLM's workers expect of any runner.

    Attributes:
        model: the loaded model, None before and after its life.
        model_memory_usage: bytes that loading it took.
        kv_caches: the layers' pages, where keys and values are kept between passes.
    """

    is_pooling_model = False
    supports_mm_inputs = False
    lora_config = None
    speculative_config = None

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.load_config = vllm_config.load_config
        self.model: Any = None
        self.model_memory_usage = 0
        self.kv_caches: list[torch.Tensor] = []

    def get_model(self) -> nn.Module:
        model: nn.Module = self.model
        return model

    def get_draft_model(self) -> nn.Module | None:
        return None

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """What a page of each layer holds; empty where no keys and values are kept."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        specs = {name: x.get_kv_cache_spec(self.vllm_config) for name, x in layers.items()}
        return {name: spec for name, spec in specs.items() if spec is not None}

    def sample_tokens(self, grammar_output: object) -> ModelRunnerOutput:
        raise RuntimeError("a denoising step decides its tokens in execute_model")

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return None

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load weights again, into the same parameters; see vLLM's function of that name."""
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        reload_weights(
            self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format
        )
        self.weights_replaced()

    def reset_lora_state(self) -> None:
        """There is none; vLLM calls this after a transfer of weights."""
        self.weights_replaced()

    def weights_replaced(self) -> None:
        """Forget what depends on where the weights lie; for subclasses."""

    def reset_mm_cache(self) -> None:
        """No multi-modal inputs."""

    def reset_encoder_cache(self) -> None:
        """No encoder."""

    def get_encoder_timing_stats(self) -> dict[str, dict[str, float | int]]:
        return {}
