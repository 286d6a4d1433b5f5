"""Turns vLLM's configuration of a diffusion model into one that runs here, or refuses to start.

vLLM calls `verify_and_update_config` once, in the process that builds the configuration, before the
platform adds its own settings.
"""

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.config.vllm import OptimizationLevel
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_sparsed.config.generation_defaults import set_generation_defaults
from vllm_sparsed.config.kv_pages import decide_pages
from vllm_sparsed.config.parameters import ServerSettings
from vllm_sparsed.config.request_check import request_check_name
from vllm_sparsed.config.settings import (
    CAPABILITY_KEY,
    FLASH_ATTENTION_4_KEY,
    GRAPH_TOKENS_KEY,
    KV_PAGES_KEY,
    server_settings,
    uses_sparse_backend,
)
from vllm_sparsed.frontend import RENDERER_MODE
from vllm_sparsed.frontend.installation import install_middleware
from vllm_sparsed.kernels.block_selection import MAX_BLOCKS
from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4
from vllm_sparsed.kernels.dimensions import BLOCK_SIZES
from vllm_sparsed.logger import init_logger
from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.quantization_check import check_quantization
from vllm_sparsed.models.special_tokens import set_special_tokens
from vllm_sparsed.scheduling.metrics import COUNTERS_KEY, export_step_counters, make_counters_folder

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(__name__)

SCHEDULER: Final = "vllm_sparsed.scheduling.scheduler.DenoisingScheduler"
CPU_WORKER: Final = "vllm_sparsed.worker.cpu_worker.DenoisingCPUWorker"
GPU_WORKER: Final = "vllm_sparsed.worker.gpu_worker.DenoisingGPUWorker"

GRAPH_TOKENS: Final = 1024
"""Longest forward pass that is recorded as a CUDA graph unless the user says otherwise: in a longer
one the kernels of an 8B model take longer than the host to launch them."""


class DiffusionEngineConfig(VerifyAndUpdateConfig):
    """The configuration hook of every diffusion model of this plugin."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set worker, scheduler and checks; refuse what bidirectional denoising cannot do.

        Raises:
            ValueError: names the option and what to do instead.
            ParameterError: a bad value in `--additional-config`.
        """
        check_supported(vllm_config.model_config.hf_config)
        check_quantization(vllm_config.model_config)
        set_special_tokens(vllm_config.model_config)
        _refuse_unsupported(vllm_config)
        model_config = vllm_config.model_config
        scheduler_config = vllm_config.scheduler_config
        server = server_settings(vllm_config)
        _check_sparse_attention(vllm_config, server)
        if server.defaults.show_canvas and vllm_config.parallel_config.data_parallel_size > 1:
            raise ValueError(
                "diffusion.show_canvas is not supported with --data-parallel-size above 1, where a "
                "question reaches the first engine alone; leave one of them out."
            )

        vllm_config.parallel_config.worker_cls = (
            CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
        )
        scheduler_config.scheduler_cls = SCHEDULER
        keeps_pages = decide_pages(vllm_config, server)
        _report_without_effect(vllm_config, keeps_pages)
        scheduler_config.async_scheduling = False
        scheduler_config.enable_chunked_prefill = False
        vllm_config.cache_config.enable_prefix_caching = False
        server = replace(server, kv_reuse_pages=keeps_pages)
        if not keeps_pages or vllm_config.cache_config.kv_cache_memory_bytes is None:
            # This also keeps vLLM from reserving most of the host's memory on CPUs.
            vllm_config.cache_config.kv_cache_memory_bytes = 0
        for name in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
            budget = getattr(scheduler_config, name)
            if budget is not None and budget < model_config.max_model_len:
                logger.warning(
                    "%s raised from %d to max_model_len=%d: a denoising step runs over a whole "
                    "sequence. Lower --max-model-len to use less memory.",
                    name,
                    budget,
                    model_config.max_model_len,
                )
                setattr(scheduler_config, name, model_config.max_model_len)
        # Fused kernels in place of torch.compile, and graphs of exact sizes in place of vLLM's; see
        # benchmarks/notes/other-layers.md.
        graph_tokens = _graph_tokens(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

        canvas = set_generation_defaults(model_config, server)
        server = replace(server, default_canvas=canvas)
        folder = make_counters_folder()
        if isinstance(vllm_config.additional_config, dict):
            # A copy: the caller may start another engine with the same settings.
            vllm_config.additional_config = {
                **vllm_config.additional_config,
                COUNTERS_KEY: folder,
                GRAPH_TOKENS_KEY: graph_tokens,
                KV_PAGES_KEY: keeps_pages,
                CAPABILITY_KEY: _capability(),
                FLASH_ATTENTION_4_KEY: flash_attention_4.installed(),
            }
        # This is the front end; where it has several processes, each exports for itself.
        export_step_counters(folder)
        if "fastapi" in sys.modules:  # an API server, not an engine in a user's program
            temperature = model_config.get_diff_sampling_param().get("temperature", 1.0)
            install_middleware(temperature)
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = RENDERER_MODE
        model_config.logits_processors = [request_check_name(server, folder)]


def _graph_tokens(vllm_config: "VllmConfig") -> int:
    """Longest forward pass, in tokens, that is recorded as a CUDA graph; 0: none is.

    vLLM's options keep their meaning: --enforce-eager, -cc.cudagraph_mode=none,
    --max-cudagraph-capture-size and the largest of --cudagraph-capture-sizes (passes are recorded
    at their own size, so the others mean nothing here).
    """
    compilation_config = vllm_config.compilation_config
    if (
        not current_platform.is_cuda()
        or vllm_config.model_config.enforce_eager
        # vLLM fills in what a level means only later.
        or vllm_config.optimization_level == OptimizationLevel.O0
        or compilation_config.cudagraph_mode == CUDAGraphMode.NONE
        # The collectives of several ranks would have to be recorded too, which has not been tried.
        or vllm_config.parallel_config.tensor_parallel_size > 1
    ):
        return 0
    sizes = compilation_config.cudagraph_capture_sizes
    limit = compilation_config.max_cudagraph_capture_size
    if sizes is not None:
        limit = max(sizes, default=0)
    return GRAPH_TOKENS if limit is None else limit


def _capability() -> tuple[int, int] | None:
    """Compute capability of this host's GPUs, by which all processes predict; None on CPUs."""
    capability = current_platform.get_device_capability()
    return None if capability is None else (capability.major, capability.minor)


def _refuse_unsupported(vllm_config: "VllmConfig") -> None:
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    cache_config, offload_config = vllm_config.cache_config, vllm_config.offload_config
    refused = {
        "--enable-lora": vllm_config.lora_config is not None,
        "--pipeline-parallel-size above 1": parallel_config.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel_config.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel_config.prefill_context_parallel_size
        > 1,
        "--enable-dbo": parallel_config.enable_dbo,
        "--enable-eplb": parallel_config.enable_eplb,
        # vLLM spreads experts over data-parallel engines too, which would have to step together.
        "--data-parallel-size above 1 (of a model with experts)": parallel_config.data_parallel_size
        > 1
        and model_config.get_num_experts() > 0,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--diffusion-config": vllm_config.diffusion_config is not None,
        "--kv-offloading-size": cache_config.kv_offloading_size is not None,
        "--cpu-offload-gb": offload_config.uva.cpu_offload_gb > 0,
        "--offload-group-size": offload_config.prefetch.offload_group_size > 0,
        "--offload-backend": offload_config.offload_backend != "auto",
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--ec-transfer-config": vllm_config.ec_transfer_config is not None,
        "--enable-prompt-embeds": model_config.enable_prompt_embeds,
        "--runner pooling": model_config.runner_type != "generate",
        "--enable-sleep-mode": model_config.enable_sleep_mode,
        "--logits-processors": bool(model_config.logits_processors),
        "--worker-cls": parallel_config.worker_cls not in ("auto", CPU_WORKER, GPU_WORKER),
        "--scheduler-cls": vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
        "--watermark-config": getattr(vllm_config, "watermark_config", None) is not None,
        "--return-sampling-mask": getattr(model_config, "return_sampling_mask", False),
        "--enable-trace-replay": getattr(model_config, "enable_trace_replay", False),
        # vLLM has not filled in its default yet, which is None: it was asked for.
        "--async-scheduling": vllm_config.scheduler_config.async_scheduling is True,
        # Its requests would reach the engine unchecked.
        "VLLM_USE_RUST_FRONTEND": envs.VLLM_USE_RUST_FRONTEND,
    }
    for option, asked in refused.items():
        if asked:
            raise ValueError(
                f"{option} is not supported by diffusion language models "
                f"({model_config.architecture}); leave it out."
            )


def _report_without_effect(vllm_config: "VllmConfig", keeps_pages: bool) -> None:
    """Say what is ignored or switched off; vLLM asks for some of it by default, so it cannot be
    refused."""
    cache_config = vllm_config.cache_config
    overrides_blocks = cache_config.num_gpu_blocks_override is not None
    if overrides_blocks and not keeps_pages:
        logger.warning(
            "--num-gpu-blocks-override has no effect, as this engine keeps no keys and values."
        )
    if cache_config.user_specified_block_size:
        logger.warning(
            "--block-size has no effect on diffusion language models; sparsed.block_size is that "
            "of the patterns."
        )
    switched_off = {
        "prefix caching": cache_config.enable_prefix_caching,
        "chunked prefill": vllm_config.scheduler_config.enable_chunked_prefill,
    }
    if any(switched_off.values()):
        logger.info(
            "Switched off, as a denoising step runs over a whole sequence: %s (vLLM's defaults, or "
            "asked for by --enable-prefix-caching or --enable-chunked-prefill).",
            ", ".join(name for name, is_on in switched_off.items() if is_on),
        )


def _check_sparse_attention(vllm_config: "VllmConfig", server: ServerSettings) -> None:
    """Refuse dimensions that the sparse kernels are not made for."""
    model_config = vllm_config.model_config
    chosen = vllm_config.attention_config.backend
    if chosen is None or not uses_sparse_backend(vllm_config):
        return
    backend = chosen.get_class()
    head_size = model_config.hf_config.hidden_size // model_config.hf_config.num_attention_heads
    # vLLM's CPU platform asks no backend whether it supports a model.
    if not backend.supports_head_size(head_size):
        raise ValueError(
            f"--attention-backend sparsed does not support the head size {head_size} (hidden size "
            f"/ attention heads) of {model_config.architecture}; it must be one of "
            f"{', '.join(map(str, backend.get_supported_head_sizes()))}."
        )
    if not backend.supports_dtype(model_config.dtype):
        raise ValueError(
            f"--attention-backend sparsed does not support --dtype {model_config.dtype}; it must "
            f"be one of {', '.join(map(str, backend.supported_dtypes))}."
        )
    longest = model_config.max_model_len
    block_size, _ = server.defaults.pattern_settings(longest)
    num_blocks = -(-longest // block_size)
    if server.defaults.sparsed_enabled and num_blocks > MAX_BLOCKS:
        larger = [f"{size}" for size in BLOCK_SIZES if -(-longest // size) <= MAX_BLOCKS]
        remedy = f"use a sparsed.block_size of {' or '.join(larger)}, or " if larger else "use "
        raise ValueError(
            f"--max-model-len {longest} with sparsed.block_size={block_size} makes {num_blocks} "
            f"blocks of a sequence, but at most {MAX_BLOCKS} are possible: {remedy}a "
            f"--max-model-len of at most {MAX_BLOCKS * block_size}."
        )
