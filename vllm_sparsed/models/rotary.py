"""Rotary position embedding with its angles in float32, in every model dtype."""

from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_sparsed.kernels.rotary_embedding import rotary_embedding


class Rotary(nn.Module):
    """Rotary embedding with vLLM's tables of angles, but cosines and sines stay in float32.

    vLLM rounds them to the model's dtype; the reference code of LLaDA does not.
    """

    def __init__(self, config: Any, max_model_len: int) -> None:
        """Build the table.

        Args:
            config: hidden_size, num_attention_heads, max_position_embeddings, rope_parameters.
            max_model_len: positions that requests may use.

        Raises:
            ValueError: the rotary scaling of the configuration ends before `max_model_len`.
        """
        super().__init__()
        self.head_size: int = config.hidden_size // config.num_attention_heads
        parameters = dict(config.rope_parameters)
        length = config.max_position_embeddings
        if parameters["rope_type"] in ("default", "ntk", "llama3"):
            length = max(length, max_model_len)
        elif parameters["rope_type"] == "dynamic":
            # Scaled for the served length: the angles must not change as a sequence grows.
            parameters.setdefault("max_trained_positions", length)
            length = max(length, max_model_len)
        self.rope = get_rope(
            self.head_size,
            max_position=length,
            is_neox_style=True,
            rope_parameters=parameters,
            dtype=torch.float32,
        )
        num_positions = self.rope.cos_sin_cache.shape[0]
        if num_positions < max_model_len:
            raise ValueError(
                f"The rotary scaling {parameters} covers {num_positions} positions, less than "
                f"--max-model-len {max_model_len}: raise its factor or lower --max-model-len."
            )

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate, possibly in place.

        Args:
            positions: int64 [tokens].
            query: [tokens, heads * head_size].
            key: [tokens, key heads * head_size].
        """
        if query.is_cuda:
            rotary_embedding(positions, query, key, self.rope.cos_sin_cache)
            return query, key
        if query.dtype == torch.float32:
            # vLLM's operation for CPUs takes a table of the queries' own dtype alone.
            ops.rotary_embedding(
                positions, query, key, self.head_size, self.rope.cos_sin_cache, True
            )
            return query, key
        rotated = self.rope.forward_static(
            positions,
            query.float(),
            key.float(),
            self.head_size,
            self.head_size,
            self.rope.cos_sin_cache,
            True,
        )
        return rotated[0].to(query.dtype), rotated[1].to(key.dtype)
