"""What the CPU and the GPU worker share."""

from dataclasses import asdict
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.mem_utils import MemorySnapshot
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.startup import compile_kernels, measure_memory


class DenoisingWorkerMixin:
    """vLLM's worker with a denoising runner and no key/value cache."""

    vllm_config: VllmConfig
    device: torch.device
    model_runner: DenoisingModelRunner

    def _make_model_runner(self) -> DenoisingModelRunner:
        return DenoisingModelRunner(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        """Bytes for a key/value cache: none. The memory check is in `compile_or_warm_up_model`,
        because vLLM does not ask this of a model without such a cache."""
        return 0

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
        with set_current_vllm_config(self.vllm_config):
            compile_kernels(self.model_runner)
            measure_memory(self.model_runner, self.memory_limit(), *self.memory_before())
        set_random_seed(self.vllm_config.model_config.seed)
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def shown_canvases(self, request_id: str) -> list[dict[str, Any]]:
        """The fields of `ShownCanvas`, which vLLM carries to other processes as they are, for each
        choice of a request that has set `diffusion_show_canvas`."""
        runner = self.model_runner
        found = runner.shown_canvases.find(runner.requests.values(), request_id)
        return [asdict(canvas) for canvas in found]

    def execute_dummy_batch(self) -> None:
        """A step of an idle data-parallel rank: nothing, because the ranks share no collective."""
