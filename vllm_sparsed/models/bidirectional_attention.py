"""Attention over a whole sequence in both directions, its keys and values kept or not."""

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.encoder_only_attention import (
    create_encoder_only_attention_backend,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.selector import get_attn_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, get_kv_quant_mode

from vllm_sparsed.attention.pages import PAGE_SIZE
from vllm_sparsed.attention.registration import BACKEND_NAME
from vllm_sparsed.config.settings import keeps_pages


class BidirectionalAttention(Attention):
    """vLLM's attention layer, encoder-only, with the backend that the user chose.

    Where the server keeps keys and values between passes, the layer has pages of vLLM's store for
    them, which the SPARSED backend alone writes and reads.

    Attributes:
        layer_index: position among the model's layers; selects the layer's block patterns.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, prefix: str
    ) -> None:
        """Create the layer.

        Args:
            num_heads: query heads of this tensor-parallel rank.
            head_size: elements of one head.
            scale: factor on the scores before the softmax.
            num_kv_heads: key and value heads of this rank.
            prefix: the layer's name, with its index in it.
        """
        # Of the cache only the dtype means anything here: for vLLM the layer has none.
        vllm_config = get_current_vllm_config()
        super().__init__(
            num_heads,
            head_size,
            scale,
            num_kv_heads=num_kv_heads,
            prefix=prefix,
            cache_config=vllm_config.cache_config if keeps_pages(vllm_config) else None,
            attn_type=AttentionType.ENCODER_ONLY,
            attn_backend=create_encoder_only_attention_backend(_chosen_backend(head_size)),
        )
        self.layer_index: int = extract_layer_index(prefix)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """What a page of the layer holds; None where the server keeps no keys and values."""
        if not keeps_pages(vllm_config):
            return None
        return FullAttentionSpec(
            block_size=PAGE_SIZE,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            kv_quant_mode=get_kv_quant_mode(self.kv_cache_dtype),
            non_causal=True,
        )


def _chosen_backend(head_size: int) -> type[AttentionBackend]:
    backend = get_current_vllm_config().attention_config.backend
    # vLLM's CPU platform answers with its own backend whatever was asked for.
    if backend is not None and backend.name == BACKEND_NAME and current_platform.is_cpu():
        return backend.get_class()
    return get_attn_backend(
        head_size, torch.get_default_dtype(), "auto", attn_type=AttentionType.ENCODER_ONLY
    )
