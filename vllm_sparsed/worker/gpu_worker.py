"""The worker on CUDA."""

from typing import Final

import torch
from vllm.v1.worker.gpu_worker import Worker

from vllm_sparsed.worker.denoising_worker import DenoisingWorkerMixin

FRAGMENTS_BYTES: Final = 512 * 2**20
"""What PyTorch's allocator may hold in pieces too small for a pass, beside its peak."""


class DenoisingGPUWorker(DenoisingWorkerMixin, Worker):
    """vLLM's CUDA worker around the denoising runner."""

    def memory_limit(self) -> int | None:
        limit: int = self.requested_memory
        return limit

    def free_bytes(self, peak: int) -> int:
        """As of the mixin: what the limit leaves beside the peak of a full batch and beside what
        lies outside PyTorch's allocator (CUDA's context, buffers of collectives)."""
        taken = self.init_snapshot.free_memory - torch.cuda.mem_get_info()[0]
        outside = max(0, taken - torch.cuda.memory_reserved())
        return int(self.requested_memory - peak - outside - FRAGMENTS_BYTES)
