"""Engines shared by the tests of this folder: each start costs many seconds."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# In this process, so that tests can look at the runner and its pattern store.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM

from tests.engine.golden_engine import start_golden
from tests.engine.http_server import SPARSED, Server, make_checkpoint, serve
from tests.engine.inspection import MAX_BATCH_TOKENS, MAX_NUM_SEQS


@pytest.fixture(scope="session")
def engine() -> Iterator[Callable[..., LLM]]:
    """The engine of a golden model, started when first asked for."""
    started: dict[str, LLM] = {}

    def get(model: str, max_batch_tokens: int = MAX_BATCH_TOKENS, **others: Any) -> LLM:
        key = f"{model} {max_batch_tokens} {others}"
        if key not in started:
            started[key] = start_golden(model, max_num_batched_tokens=max_batch_tokens, **others)
        return started[key]

    yield get
    for llm in started.values():
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden LLaDA with a tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def profile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes its traces."""
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="session")
def server(
    checkpoint: Path, profile_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of `checkpoint` with vLLM's developer routes and the canvases'."""
    profiler = {
        "profiler": "torch",
        "torch_profiler_dir": str(profile_folder),
        "torch_profiler_with_stack": False,
    }
    options = {
        "--scheduling-policy": "priority",
        "--max-num-seqs": str(MAX_NUM_SEQS),
        "--max-num-batched-tokens": str(MAX_BATCH_TOKENS),
        "--profiler-config": json.dumps(profiler),
        # For the page that shows canvases: which requests may be watched, and from where.
        "--additional-config": json.dumps({"sparsed": SPARSED, "diffusion": {"show_canvas": True}}),
        "--allowed-origins": '["*"]',
    }
    log = tmp_path_factory.mktemp("server") / "log"
    flat = [text for option in options.items() for text in option]
    with serve(checkpoint, log, *flat, VLLM_SERVER_DEV_MODE="1", VLLM_PLUGINS="sparsed") as running:
        yield running
