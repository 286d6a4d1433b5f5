"""iLLaDA-8B: LLaDA with grouped queries, a tied head and Llama's names."""

from typing import ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparsed.models.layers import STACKED_PROJECTIONS, MaskedDiffusionModel


class ILLaDAForCausalLM(MaskedDiffusionModel):
    """iLLaDA: row p of the logits predicts position p."""

    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_stacked=STACKED_PROJECTIONS
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, qkv_bias=False, prefix=prefix)
