"""Settings of one engine, derived from vLLM's configuration alike in every process."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from vllm_sparsed.attention.pattern_store import PatternStoreSize
from vllm_sparsed.attention.registration import BACKEND_NAME
from vllm_sparsed.config.parameter_table import SHORT_CONTEXT
from vllm_sparsed.config.parameters import ServerSettings, parse_server_settings
from vllm_sparsed.kernels.pattern_building import pattern_width
from vllm_sparsed.models.registry import MODELS
from vllm_sparsed.planning.crossover import Crossover
from vllm_sparsed.planning.kernel_costs import attention_costs, fa4_range

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

GRAPH_TOKENS_KEY: Final = "sparsed_graph_tokens"
"""Key of `additional_config` under which the limit for CUDA graphs travels to the workers."""


CAPABILITY_KEY: Final = "sparsed_capability"
"""Key of `additional_config` under which the GPUs' compute capability, [major, minor], travels to
the other processes; there is none on CPUs."""

KV_PAGES_KEY: Final = "sparsed_kv_pages"
"""Key of `additional_config` that says whether keys and values are kept between passes."""

FLASH_ATTENTION_4_KEY: Final = "sparsed_flash_attention_4"
"""Key of `additional_config` that says whether FlashAttention 4 is installed."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What planning a request needs to know about the engine.

    Attributes:
        server: defaults and limits of the request parameters.
        max_model_len: longest sequence, prompt and canvas, in tokens.
        max_batch_tokens: tokens of one forward pass over all running requests.
        mask_token_id: the token that marks an undecided position.
        store: size of the pattern store; None where every request stays dense.
        crossover: predicts which attention is faster; None on CPUs, where nothing is predicted.
        graph_tokens: passes of up to so many tokens are recorded as CUDA graphs; 0: none are.
        logit_shift: whether row p of the logits decides position p + 1 (Dream).
    """

    server: ServerSettings
    max_model_len: int
    max_batch_tokens: int
    mask_token_id: int
    store: PatternStoreSize | None
    crossover: Crossover | None
    graph_tokens: int
    logit_shift: bool = False


def uses_sparse_backend(vllm_config: "VllmConfig") -> bool:
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == BACKEND_NAME


def keeps_pages(vllm_config: "VllmConfig") -> bool:
    """Whether memory for keys and values is allocated, once the configuration hook has decided."""
    additional = vllm_config.additional_config
    return isinstance(additional, dict) and bool(additional.get(KV_PAGES_KEY, False))


def server_settings(vllm_config: "VllmConfig") -> ServerSettings:
    """Defaults and limits of the request parameters; a dense backend switches sparsity off."""
    additional = vllm_config.additional_config
    additional = additional if isinstance(additional, dict) else {}
    architecture = vllm_config.model_config.architecture
    server = parse_server_settings(additional, MODELS[architecture].algorithm)
    if KV_PAGES_KEY in additional:
        server = replace(server, kv_reuse_pages=additional[KV_PAGES_KEY])
    if uses_sparse_backend(vllm_config):
        return server
    return replace(server, defaults=replace(server.defaults, sparsed_enabled=False))


def engine_settings(vllm_config: "VllmConfig") -> EngineSettings:
    server = server_settings(vllm_config)
    scheduler_config = vllm_config.scheduler_config
    max_batch_tokens = (
        scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    )
    max_model_len = vllm_config.model_config.max_model_len
    additional = vllm_config.additional_config
    additional = additional if isinstance(additional, dict) else {}
    crossover = _crossover(
        vllm_config.model_config,
        additional.get(CAPABILITY_KEY),
        server.sparsed_flash_attention_4 and additional.get(FLASH_ATTENTION_4_KEY, False),
    )
    return EngineSettings(
        server=server,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        mask_token_id=vllm_config.model_config.hf_config.mask_token_id,
        store=pattern_store_size(server, max_model_len, max_batch_tokens, crossover is None),
        crossover=crossover,
        logit_shift=MODELS[vllm_config.model_config.architecture].logit_shift,
        graph_tokens=additional.get(GRAPH_TOKENS_KEY, 0),
    )


def _crossover(
    model_config: "ModelConfig", capability: Sequence[int] | None, flash_attention_4: bool
) -> Crossover | None:
    if capability is None:
        return None
    # The whole model's heads: a request is planned alike with any tensor parallelism.
    num_heads = model_config.hf_config.num_attention_heads
    head_dim = model_config.hf_config.hidden_size // num_heads
    major, minor = capability
    ratio = num_heads // model_config.get_total_num_kv_heads()
    dtype = model_config.dtype
    fa4 = fa4_range((major, minor), head_dim, dtype, ratio, flash_attention_4)
    costs = attention_costs((major, minor), head_dim, dtype, heads_per_kv_head=ratio, fa4=fa4)
    return Crossover(costs, num_heads, head_dim)


def pattern_store_size(
    server: ServerSettings, max_model_len: int, max_batch_tokens: int, short_rows: bool
) -> PatternStoreSize | None:
    """Rows for a full batch, as wide as any request's.

    Args:
        short_rows: whether the batch may be one of short requests, with their smaller blocks. On
            GPUs, where these seldom pay, it counts as one of long requests.
    """
    defaults = server.defaults
    if not defaults.sparsed_enabled:
        return None
    max_canvas = server.sparsed_max_canvas or max_model_len
    short = min(SHORT_CONTEXT, max_model_len)
    width = 0
    for length in (short, max_model_len):
        block, select = defaults.pattern_settings(length)
        canvas_blocks = -(-min(max_canvas, length) // block)
        width = max(width, pattern_width(-(-length // block), canvas_blocks, select))
    short_block, _ = defaults.pattern_settings(short)
    long_block, _ = defaults.pattern_settings(max_model_len)
    num_rows = -(-max_batch_tokens // (short_block if short_rows else long_block))
    # An eighth more than whole blocks need: the last block of each request may be partly filled.
    num_rows += -(-num_rows // 8)
    # One short request always fits, guided too where the batch holds both of its sequences.
    sequences = 2 if 2 * short <= max_batch_tokens else 1
    return PatternStoreSize(
        num_rows=max(num_rows, sequences * -(-short // short_block)), width=width
    )
