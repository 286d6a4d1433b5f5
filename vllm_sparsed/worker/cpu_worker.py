"""The worker on CPUs."""

import os

import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from vllm_sparsed.worker.denoising_worker import DenoisingWorkerMixin


class DenoisingCPUWorker(DenoisingWorkerMixin, CPUWorker):
    """vLLM's CPU worker around the denoising runner."""

    def init_device(self) -> None:
        """As in CPUWorker, which names its own runner class and has no seam for another."""
        self.device = torch.device("cpu")
        init_method = self.distributed_init_method
        # The name of the shared memory through which the ranks of one engine reduce.
        os.environ["VLLM_DIST_IDENT"] = (
            os.path.basename(init_method.removeprefix("file://"))
            if init_method.startswith("file://")
            else init_method.split(":")[-1]
        )
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = self._make_model_runner()
