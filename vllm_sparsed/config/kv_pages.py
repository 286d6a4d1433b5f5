"""Whether an engine keeps keys and values between passes, and how much memory they can take."""

from typing import TYPE_CHECKING, Final

import psutil  # type: ignore[import-untyped]
from vllm.platforms import current_platform
from vllm.utils.mem_utils import format_gib
from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype

from vllm_sparsed.attention.pages import PAGE_SIZE
from vllm_sparsed.config.parameters import ServerSettings
from vllm_sparsed.config.settings import uses_sparse_backend
from vllm_sparsed.logger import init_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

_FP8: Final = ("fp8", "fp8_e4m3")

LARGEST_SHARE: Final = 0.5
"""Of the memory that the engine may take, what the longest sequence's keys and values may need for
pages to be allocated unasked: more would keep many a server from starting that starts without."""

LARGEST_PART: Final = 0.9
"""Of that memory, what they may need together with weights and a full batch, as guessed."""


def decide_pages(vllm_config: "VllmConfig", server: ServerSettings) -> bool:
    """Whether to allocate pages, said in one line of the log.

    Raises:
        ValueError: they are asked for and cannot be had.
    """
    cache_dtype = vllm_config.cache_config.cache_dtype
    name, asked = "diffusion.kv_reuse_pages=true", server.kv_reuse_pages
    if asked is None and server.defaults.kv_reuse != "none":
        name, asked = f"diffusion.kv_reuse={server.defaults.kv_reuse}", True
    elif asked is None and cache_dtype in _FP8:
        name, asked = f"--kv-cache-dtype {cache_dtype}", True
    if not uses_sparse_backend(vllm_config):
        if asked:
            raise ValueError(f"{name} needs --attention-backend sparsed.")
        return False
    sequence = sequence_bytes(vllm_config)
    memory = _memory_bytes(vllm_config)
    if asked is None:
        asked = sequence < LARGEST_SHARE * memory
        if current_platform.is_cuda():
            asked = asked and sequence + _other_bytes(vllm_config) < LARGEST_PART * memory
    keeps = asked
    logger.info(
        "Keys and values are %s between passes: those of the longest sequence (%d tokens) take %s "
        "of %s GiB; change it with diffusion.kv_reuse_pages=%s",
        "kept for requests with diffusion_kv_reuse" if keeps else "not kept",
        vllm_config.model_config.max_model_len,
        format_gib(sequence),
        format_gib(memory),
        "false" if keeps else "true",
    )
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    allowed = ("auto", *_FP8, model_dtype) if keeps else ("auto", "bfloat16", "float16")
    if cache_dtype not in allowed:
        raise ValueError(
            f"--kv-cache-dtype {cache_dtype} is not supported by diffusion language models; it "
            f"must be one of {', '.join(allowed)}"
            + ("." if keeps else " (there is no key/value cache).")
        )
    return keeps


def sequence_bytes(vllm_config: "VllmConfig") -> int:
    """Bytes of the pages of one sequence of the greatest length, on each rank."""
    model_config = vllm_config.model_config
    dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, model_config)
    config = model_config.hf_config
    token = (
        2
        * config.num_hidden_layers
        * model_config.get_num_kv_heads(vllm_config.parallel_config)
        * model_config.get_head_size()
        * get_dtype_size(dtype)
    )
    return -(-model_config.max_model_len // PAGE_SIZE) * PAGE_SIZE * token


def wanted_bytes(vllm_config: "VllmConfig") -> int:
    """Bytes of the most pages that can ever be in use: as many guided requests as may run, each of
    the greatest length; vLLM holds one more page back."""
    sequences = 2 * vllm_config.scheduler_config.max_num_seqs
    return sequence_bytes(vllm_config) * (sequences + 1)


def _other_bytes(vllm_config: "VllmConfig") -> int:
    """About what weights and a full batch take on each rank: the start is to succeed more often
    with a guess than without; what they really take is measured there."""
    model_config = vllm_config.model_config
    config = model_config.hf_config
    hidden = config.hidden_size
    inner = config.intermediate_size  # of one expert, where there are several
    layer = 4 * hidden * hidden + 3 * hidden * inner * max(1, getattr(config, "num_experts", 1))
    vocabulary = 2 * model_config.get_vocab_size() * hidden
    ranks = vllm_config.parallel_config.tensor_parallel_size
    weights = (config.num_hidden_layers * layer + vocabulary) // ranks
    scheduler_config = vllm_config.scheduler_config
    tokens = max(scheduler_config.max_num_batched_tokens or 0, model_config.max_model_len)
    activations = tokens * (6 * hidden + 3 * inner // ranks)
    return int((weights + activations) * get_dtype_size(model_config.dtype))


def _memory_bytes(vllm_config: "VllmConfig") -> int:
    if current_platform.is_cuda():
        total = current_platform.get_device_total_memory()
        return int(total * vllm_config.cache_config.gpu_memory_utilization)
    return int(psutil.virtual_memory().available) // 2
