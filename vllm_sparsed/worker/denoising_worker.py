"""What the CPU and the GPU worker share."""

from typing import Any, Final

import psutil  # type: ignore[import-untyped]
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.mem_utils import MemorySnapshot, format_gib
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sparsed.config.kv_pages import sequence_bytes, wanted_bytes
from vllm_sparsed.worker.memory_errors import ADVICE, StartupError
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.startup import compile_kernels, compile_window_kernels, measure_memory

HOST_BYTES: Final = 2**30
"""Most memory for pages on a CPU, unless VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes say more
or two sequences need it."""


class DenoisingWorkerMixin:
    """vLLM's worker with a denoising runner."""

    vllm_config: VllmConfig
    device: torch.device
    model_runner: DenoisingModelRunner
    _is_measured = False

    def _make_model_runner(self) -> DenoisingModelRunner:
        return DenoisingModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        """Bytes for the pages of keys and values, beside weights, a full batch and the patterns.

        vLLM asks this where the server keeps keys and values; elsewhere the memory is measured in
        `compile_or_warm_up_model`.

        Raises:
            StartupError: the batch does not fit, or the pages of one sequence do not.
        """
        self.model_runner.prepare()
        with set_current_vllm_config(self.vllm_config), torch.inference_mode():
            compile_kernels(self.model_runner)
            peak = self._measure_memory()
        self._is_measured = True
        cache_config = self.vllm_config.cache_config
        if cache_config.kv_cache_memory_bytes:
            return cache_config.kv_cache_memory_bytes
        free = min(wanted_bytes(self.vllm_config), self.free_bytes(peak))
        needed = sequence_bytes(self.vllm_config)
        fits_itself = self.vllm_config.model_config.original_max_model_len == -1
        if free <= needed and cache_config.num_gpu_blocks_override is None and not fits_itself:
            raise StartupError(
                f"Keys and values of one sequence of {self.vllm_config.model_config.max_model_len} "
                f"tokens need {format_gib(needed)} GiB, but {format_gib(max(free, 0))} GiB are "
                f"left for them. Keep none (diffusion.kv_reuse_pages=false). {ADVICE}"
            )
        return free

    def _measure_memory(self) -> int:
        return measure_memory(self.model_runner, self.memory_limit(), *self.memory_before())

    def free_bytes(self, peak: int) -> int:
        """Memory for pages beside a full batch whose peak is known."""
        # The host's memory is others' too, and all of it is written at start.
        most = min(HOST_BYTES, psutil.virtual_memory().available // 4)
        return max(most, 2 * sequence_bytes(self.vllm_config))

    def memory_limit(self) -> int | None:
        """Bytes that this worker may take on its device, None where vLLM sets no limit."""
        return None

    def memory_before(self) -> tuple[MemorySnapshot | None, int]:
        """vLLM's snapshot of the device before the model was loaded, and the bytes that this
        process had taken by then."""
        return None, 0

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile the kernels and check that the largest batch fits.

        Raises:
            StartupError: it does not.
        """
        cache_config = self.vllm_config.cache_config
        with set_current_vllm_config(self.vllm_config):
            if not self._is_measured:
                compile_kernels(self.model_runner)
                self._measure_memory()
            elif cache_config.kv_cache_memory_bytes or cache_config.num_gpu_blocks_override:
                # So much was asked for; that it fits beside the rest nobody has seen.
                self._measure_memory()
            compile_window_kernels(self.model_runner)
        set_random_seed(self.vllm_config.model_config.seed)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def shown_canvases(self, request_id: str) -> list[dict[str, Any]]:
        """The fields of `ShownCanvas`, which vLLM carries to other processes as they are, for each
        choice of a request that has set `diffusion_show_canvas`."""
        runner = self.model_runner
        found = runner.shown_canvases.find(runner.requests.values(), request_id)
        return [canvas.to_fields() for canvas in found]

    def execute_dummy_batch(self) -> None:
        """A step of an idle data-parallel rank: nothing, because the ranks share no collective."""
