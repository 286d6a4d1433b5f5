"""A tensor-parallel group of one, which vLLM's layers ask for."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)

from vllm_sparsed.plugin import register


@pytest.fixture(scope="session")
def parallel_groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    register()
    # An engine of another test in this process may have made them.
    if model_parallel_is_initialized():
        yield
        return
    rendezvous: Path = tmp_path_factory.mktemp("groups") / "rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{rendezvous}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    destroy_model_parallel()
    destroy_distributed_environment()
