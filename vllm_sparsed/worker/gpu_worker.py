"""The worker on CUDA."""

from vllm.v1.worker.gpu_worker import Worker

from vllm_sparsed.worker.denoising_worker import DenoisingWorkerMixin


class DenoisingGPUWorker(DenoisingWorkerMixin, Worker):
    """vLLM's CUDA worker around the denoising runner."""

    def memory_limit(self) -> int | None:
        limit: int = self.requested_memory
        return limit
