"""Registration of the SPARSED backend with vLLM: names, limits and its parts."""

from typing import ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, AttentionType

from vllm_sparsed.attention.implementation import SparsedAttentionImpl
from vllm_sparsed.attention.metadata import SparsedMetadataBuilder
from vllm_sparsed.attention.registration import BACKEND_NAME
from vllm_sparsed.kernels.dimensions import HEAD_DIMS


class SparsedAttentionBackend(AttentionBackend):
    """SparseD (arXiv 2509.24014) for bidirectional models."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[SparsedAttentionImpl]:
        return SparsedAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[SparsedMetadataBuilder]:
        return SparsedMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.ENCODER_ONLY

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)
