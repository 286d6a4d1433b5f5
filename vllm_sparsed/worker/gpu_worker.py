"""The worker on CUDA."""

from vllm.platforms import current_platform
from vllm.utils.import_utils import import_pynvml
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker.gpu_worker import Worker

from vllm_sparsed.logger import init_logger
from vllm_sparsed.worker.denoising_worker import DenoisingWorkerMixin

logger = init_logger(__name__)


class DenoisingGPUWorker(DenoisingWorkerMixin, Worker):
    """vLLM's CUDA worker around the denoising runner."""

    def init_device(self) -> None:
        """As vLLM's, which takes its snapshot of the device when context and collectives have taken
        their memory: NVML tells how much that was."""
        before = _used_bytes()
        super().init_device()
        after = _used_bytes()
        index = current_platform.visible_device_id_to_physical_device_id(self.device.index or 0)
        self._context_bytes = max(0, after.get(index, 0) - before.get(index, 0))

    def memory_limit(self) -> int | None:
        limit: int = self.requested_memory
        return limit

    def memory_before(self) -> tuple[MemorySnapshot | None, int]:
        return self.init_snapshot, self._context_bytes


def _used_bytes() -> dict[int, int]:
    """Memory in use on each of the machine's devices, without a context on any of them."""
    try:
        nvml = import_pynvml()
        nvml.nvmlInit()
        try:
            return {
                i: int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(i)).used)
                for i in range(nvml.nvmlDeviceGetCount())
            }
        finally:
            nvml.nvmlShutdown()
    except Exception as error:
        # Containers may have no NVML: then the check does without this part.
        logger.warning("The memory of this process's context is not known: %s", error)
        return {}
