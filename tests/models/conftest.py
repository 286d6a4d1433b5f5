"""A tensor-parallel group of one, which vLLM's layers ask for."""

from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)

from vllm_sparsed.plugin import register


@pytest.fixture
def parallel_groups(tmp_path: Path) -> None:
    """Made for each test that finds none: an engine of another file in this process may have made
    them, or taken them with it."""
    register()
    if model_parallel_is_initialized():
        return
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path / 'rendezvous'}", 0, "gloo")
        initialize_model_parallel(1, 1)
