"""A checkpoint in the layout of the shipped model, with random weights."""

import sys
from pathlib import Path

import pytest
import torch

from small_model.training.data import Encoder
from small_model.training.model import Model, Shape, save_served_model
from small_model.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    train_tokenizer(folder)
    encoder = Encoder(folder)
    torch.manual_seed(0)
    rows = -(-encoder.vocab_size // 64) * 64
    model = Model(Shape(rows, d_model=64, n_heads=1, n_layers=2, mlp_hidden_size=64))
    # The embedding is also the head: as it is, a mask would be taken for the likeliest token.
    model.wte.data[encoder.mask] *= -0.1
    save_served_model(
        model, folder, folder, mask=encoder.mask, end=encoder.end, turn_end=encoder.turn_end
    )
    return folder


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path in the place of the `vllm` command; what lies there is up to the test."""
    command = tmp_path / "bin" / "vllm"
    command.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(command.with_name("python")))
    return command
