"""What tests look at inside an engine that runs in their own process."""

from collections.abc import Callable

import torch
from vllm import LLM

from vllm_sparsed.worker.model_runner import DenoisingModelRunner

MAX_MODEL_LEN = 640
MAX_BATCH_TOKENS = 2048
MAX_NUM_SEQS = 16


def runner_of(llm: LLM) -> DenoisingModelRunner:
    """The model runner of an engine that lives in this process."""
    core = llm.llm_engine.engine_core.engine_core
    runner: DenoisingModelRunner = core.model_executor.driver_worker.worker.model_runner
    return runner


class Rerun:
    """In place of a CUDA graph, on CPUs: runs the recorded pass again."""

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        self._run = run

    def replay(self) -> torch.Tensor:
        return self._run()
