"""Turns vLLM's configuration of a diffusion model into one that runs here, or refuses to start.

vLLM calls `verify_and_update_config` once, in the process that builds the configuration, before the
platform adds its own settings.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from vllm_sparsed.metrics import COUNTERS_KEY, export_step_counters, make_counters_folder
from vllm_sparsed.models.checkpoint_config import check_supported
from vllm_sparsed.request_check import request_check_name
from vllm_sparsed.settings import request_settings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

SCHEDULER: Final = "vllm_sparsed.scheduler.DenoisingScheduler"
CPU_WORKER: Final = "vllm_sparsed.worker.cpu_worker.DenoisingCPUWorker"
GPU_WORKER: Final = "vllm_sparsed.worker.gpu_worker.DenoisingGPUWorker"


class GenerationDefaults(dict[str, Any]):
    """Sampling defaults where `max_new_tokens` is a default, not a cap.

    vLLM merges `override_generation_config` into the defaults of a request, and also asks it for
    `max_new_tokens` to cap larger explicit values. The default canvas must not cap anything, so
    `get` does not show it; merging does.
    """

    def get(self, key: str, default: Any = None) -> Any:
        return default if key == "max_new_tokens" else super().get(key, default)


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
        _refuse_unsupported(vllm_config)
        model_config = vllm_config.model_config
        scheduler_config = vllm_config.scheduler_config
        server = request_settings(vllm_config)

        vllm_config.parallel_config.worker_cls = (
            CPU_WORKER if current_platform.is_cpu() else GPU_WORKER
        )
        scheduler_config.scheduler_cls = SCHEDULER
        scheduler_config.async_scheduling = False
        scheduler_config.enable_chunked_prefill = False
        vllm_config.cache_config.enable_prefix_caching = False
        # No key/value cache: this also keeps vLLM from reserving host memory for one on CPUs.
        vllm_config.cache_config.kv_cache_memory_bytes = 0
        if scheduler_config.max_num_batched_tokens < model_config.max_model_len:
            logger.warning(
                "max_num_batched_tokens raised from %d to max_model_len=%d: a denoising step runs "
                "over a whole sequence. Lower --max-model-len to use less memory.",
                scheduler_config.max_num_batched_tokens,
                model_config.max_model_len,
            )
            scheduler_config.max_num_batched_tokens = model_config.max_model_len
        # vLLM's fused kernels in place of torch.compile; see benchmarks/NOTES.md.
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE

        canvas = _set_generation_defaults(model_config, server.default_canvas)
        server = replace(server, default_canvas=canvas)
        folder = make_counters_folder()
        if isinstance(vllm_config.additional_config, dict):
            vllm_config.additional_config[COUNTERS_KEY] = folder
        # This is the front end; where it has several processes, each exports for itself.
        export_step_counters(folder)
        model_config.logits_processors = [request_check_name(server, folder)]


def _refuse_unsupported(vllm_config: "VllmConfig") -> None:
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    refused = {
        "--enable-lora": vllm_config.lora_config is not None,
        "--pipeline-parallel-size above 1": parallel_config.pipeline_parallel_size > 1,
        "--decode-context-parallel-size above 1": parallel_config.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size above 1": parallel_config.prefill_context_parallel_size
        > 1,
        "--enable-dbo": parallel_config.enable_dbo,
        "--speculative-config": vllm_config.speculative_config is not None,
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--ec-transfer-config": vllm_config.ec_transfer_config is not None,
        "--enable-prompt-embeds": model_config.enable_prompt_embeds,
        "--runner pooling": model_config.runner_type != "generate",
        "--enable-sleep-mode": model_config.enable_sleep_mode,
        "--logits-processors": bool(model_config.logits_processors),
        "--kv-cache-dtype (there is no key/value cache)": vllm_config.cache_config.cache_dtype
        not in ("auto", "bfloat16", "float16"),
        "--worker-cls": parallel_config.worker_cls not in ("auto", CPU_WORKER, GPU_WORKER),
        "--scheduler-cls": vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER),
        "--watermark-config": getattr(vllm_config, "watermark_config", None) is not None,
        "--return-sampling-mask": getattr(model_config, "return_sampling_mask", False),
        "--enable-trace-replay": getattr(model_config, "enable_trace_replay", False),
    }
    for option, asked in refused.items():
        if asked:
            raise ValueError(
                f"{option} is not supported by diffusion language models "
                f"({model_config.architecture}); leave it out."
            )


def _set_generation_defaults(model_config: "ModelConfig", default_canvas: int) -> int:
    """Default temperature 0 and the default canvas, where the checkpoint names none.

    Returns:
        The canvas of a request that asks for no number of tokens.
    """
    checkpoint = model_config.try_get_generation_config()
    if model_config.generation_config == "vllm":
        checkpoint = {}
    given = model_config.override_generation_config
    canvas = given.get("max_new_tokens") or checkpoint.get("max_new_tokens") or default_canvas
    defaults: dict[str, Any] = {}
    if "temperature" not in checkpoint:
        defaults["temperature"] = 0.0
    if "max_new_tokens" in given:
        model_config.override_generation_config = {**defaults, **given}
    else:
        defaults["max_new_tokens"] = canvas
        model_config.override_generation_config = GenerationDefaults({**defaults, **given})
    return int(canvas)
