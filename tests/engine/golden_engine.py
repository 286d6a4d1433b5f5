"""Engines of the golden models, in the process of the tests."""

from typing import Any

from vllm import LLM
from vllm.platforms import current_platform

from tests.engine.golden_cases import GOLDEN
from tests.engine.inspection import MAX_BATCH_TOKENS, MAX_MODEL_LEN


def start_golden(model: str, **options: Any) -> LLM:
    """An engine for the golden cases of `model`; `options` are further or other ones of LLM."""
    # The golden cases go down to blocks of 16 and up to a share of 0.5. At their lengths dense
    # attention would be faster on a GPU.
    sparsed = {"block_size": 16, "select": 0.5, "dense_if_faster": False}
    usual: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": MAX_BATCH_TOKENS,
        "max_num_seqs": 16,
        "attention_backend": "sparsed",
        "additional_config": {"sparsed": sparsed},
    }
    if current_platform.is_cuda():
        # Small models: a GPU may have other work, other tests for instance.
        usual["gpu_memory_utilization"] = 0.06
    return LLM(str(GOLDEN / model), skip_tokenizer_init=True, **(usual | options))
