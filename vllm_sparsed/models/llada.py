"""LLaDA (arXiv 2502.09992): LLaDA-8B Base and Instruct, LLaDA-1.5, UltraLLaDA."""

import re
from typing import ClassVar, Final

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparsed.models.layers import STACKED_PROJECTIONS, MaskedDiffusionModel

_OUTSIDE: Final = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
    "model.transformer.blocks": "model.layers",
}
# `ff_out` is the head outside the blocks, the down projection inside them.
_INSIDE: Final = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


class LLaDAModelLM(MaskedDiffusionModel):
    """LLaDA: row p of the logits predicts position p; semi-autoregressive decoding."""

    # The checkpoint has OLMo's names. Whole words: quantizations list modules without a dot behind
    # them, and some write expressions ("re:.*attn_out").
    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_regex={
            re.compile(rf"(?<!\w){re.escape(name)}(?!\w)"): new
            for name, new in (_OUTSIDE | _INSIDE).items()
        },
        orig_to_new_stacked=STACKED_PROJECTIONS,
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config, qkv_bias=config.include_qkv_bias, prefix=prefix)

    @staticmethod
    def checkpoint_name(name: str) -> str:
        """The checkpoint's name of what is `name` here."""
        for old, new in (_OUTSIDE | _INSIDE).items():
            name = name.replace(new, old)
        return name
