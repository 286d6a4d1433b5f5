"""LLaDA-MoE-7B-A1B: Base, Instruct and Instruct-TD, with experts apart or fused."""

import re
from typing import ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparsed.models.experts import Experts
from vllm_sparsed.models.layers import STACKED_ATTENTION, MaskedDiffusionModel


class LLaDAMoEModelLM(MaskedDiffusionModel):
    """LLaDA with norms of each query and key head, and experts after attention."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"]
    }
    # Fused checkpoints hold all experts of a layer in one tensor, gate above up: under these names
    # (dInfer's), or under those that vLLM knows.
    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"\.mlp\.w1$"): ".mlp.experts.gate_up_proj",
            re.compile(r"\.mlp\.w2$"): ".mlp.experts.down_proj",
        },
        orig_to_new_stacked=STACKED_ATTENTION,
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(
            vllm_config, qkv_bias=False, prefix=prefix, qk_norm=True, feed_forward=Experts
        )
