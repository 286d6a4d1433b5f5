"""LLaDA (arXiv 2502.09992): LLaDA-8B Base and Instruct, LLaDA-1.5, UltraLLaDA."""

import re
from typing import ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparsed.models.layers import STACKED_PROJECTIONS, MaskedDiffusionModel


class LLaDAModelLM(MaskedDiffusionModel):
    """LLaDA: row p of the logits predicts position p; semi-autoregressive decoding."""

    # The checkpoint has OLMo's names. `ff_out` is the head outside the blocks, the down
    # projection inside them.
    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\.transformer\.wte\."): "model.embed_tokens.",
            re.compile(r"^model\.transformer\.ln_f\."): "model.norm.",
            re.compile(r"^model\.transformer\.ff_out\."): "lm_head.",
            re.compile(r"^model\.transformer\.blocks\."): "model.layers.",
            re.compile(r"\.attn_norm\."): ".input_layernorm.",
            re.compile(r"\.ff_norm\."): ".post_attention_layernorm.",
            re.compile(r"\.([qkv]_proj)\."): r".self_attn.\1.",
            re.compile(r"\.attn_out\."): ".self_attn.o_proj.",
            re.compile(r"\.ff_proj\."): ".mlp.gate_proj.",
            re.compile(r"\.up_proj\."): ".mlp.up_proj.",
            re.compile(r"\.ff_out\."): ".mlp.down_proj.",
        },
        orig_to_new_stacked=STACKED_PROJECTIONS,
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config, qkv_bias=config.include_qkv_bias, prefix=prefix)
