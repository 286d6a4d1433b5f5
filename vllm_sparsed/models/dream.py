"""Dream (arXiv 2508.15487): Dream-7B Base and Instruct, DiffuCoder, Dream-Coder."""

from typing import ClassVar

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparsed.models.layers import STACKED_PROJECTIONS, MaskedDiffusionModel


class DreamModel(MaskedDiffusionModel):
    """Dream: Qwen2's layers and names; row p of the logits predicts position p + 1."""

    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_stacked=STACKED_PROJECTIONS
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, qkv_bias=True, prefix=prefix)
