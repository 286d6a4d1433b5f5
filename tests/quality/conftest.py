"""One trained tokenizer and one small checkpoint for this folder; an engine for each module."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# In this process, so that requests can be watched; before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM

from small_model.training.data import Encoder
from small_model.training.model import Model, Shape, save_served_model
from small_model.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder: Path) -> Encoder:
    return Encoder(tokenizer_folder)


@pytest.fixture(scope="session")
def checkpoint(
    tokenizer_folder: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Random weights with attention that differs between heads and steps."""
    rows = -(-encoder.vocab_size // 64) * 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(Shape(rows, d_model=64, n_heads=4, n_layers=2, mlp_hidden_size=96))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.15
    folder = tmp_path_factory.mktemp("random")
    save_served_model(
        model,
        tokenizer_folder,
        folder,
        mask=encoder.mask,
        end=encoder.end,
        turn_end=encoder.turn_end,
    )
    return folder


# Of a module, not of the session: the end of any engine in this process takes with it the process
# groups of all others.
@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    engine = LLM(
        str(checkpoint),
        attention_backend="sparsed",
        dtype="float32",
        max_model_len=256,
        max_num_batched_tokens=1024,
        additional_config={"sparsed": {"select": 1.0, "block_size": 16, "max_canvas": 32}},
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()
