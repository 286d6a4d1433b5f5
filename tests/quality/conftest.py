"""One trained tokenizer for all tests of this folder."""

from pathlib import Path

import pytest

from benchmarks.training.data import Encoder
from benchmarks.training.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(tokenizer_folder: Path) -> Encoder:
    return Encoder(tokenizer_folder)
