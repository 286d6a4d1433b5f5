"""The canvas and temperature of a request that names none, and what caps its canvas."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs

from tests.engine.golden_cases import GOLDEN
from vllm_sparsed.config import request_check


def model_config(model: Path = GOLDEN / "llada-mha", **options: Any) -> ModelConfig:
    arguments = {"skip_tokenizer_init": True, "max_model_len": 640, "attention_backend": "sparsed"}
    config = EngineArgs(model=str(model), **{**arguments, **options}).create_engine_config()
    return config.model_config


def cap(config: ModelConfig) -> int | None:
    """What vLLM's servers cap an explicit max_tokens to."""
    if config.generation_config not in ("auto", "vllm"):
        limit: int | None = config.get_diff_sampling_param().get("max_tokens")
        return limit
    return config.override_generation_config.get("max_new_tokens")


def defaults(config: ModelConfig) -> dict[str, Any]:
    """vLLM's defaults of a request; its canvas is also the one of the check."""
    merged = config.get_diff_sampling_param()
    assert config.logits_processors is not None
    check = getattr(request_check, str(config.logits_processors[0]).partition(":")[2])
    params = SamplingParams(max_tokens=None)
    check.validate_params(params)
    assert params.max_tokens == merged["max_tokens"]
    return merged


def write(folder: Path, **values: Any) -> str:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint whose own defaults are 96 tokens at temperature 0.5."""
    path = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llada-mha", path)
    write(path, max_new_tokens=96, temperature=0.5, eos_token_id=[2, 5])
    return path


def test_no_defaults_anywhere() -> None:
    config = model_config()
    assert defaults(config) == {"temperature": 0.0, "max_tokens": 128}
    assert cap(config) is None


def test_the_checkpoint_gives_defaults_that_cap_nothing(checkpoint: Path) -> None:
    config = model_config(checkpoint)
    assert defaults(config) == {"temperature": 0.5, "max_tokens": 96}
    assert cap(config) is None


def test_the_checkpoint_may_be_ignored(checkpoint: Path) -> None:
    config = model_config(checkpoint, generation_config="vllm")
    assert defaults(config) == {"temperature": 0.0, "max_tokens": 128}
    assert cap(config) is None


def test_a_folder_without_a_canvas_caps_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """And nothing of the checkpoint's own generation_config.json is used in its place."""
    folder = write(tmp_path, temperature=0.25, eos_token_id=[2, 7])
    config = model_config(checkpoint, generation_config=folder)
    assert defaults(config) == {"temperature": 0.25, "max_tokens": 128}
    assert cap(config) is None
    assert config.try_get_generation_config()["eos_token_id"] == [2, 7]


def test_a_folder_with_a_canvas_caps(checkpoint: Path, tmp_path: Path) -> None:
    folder = write(tmp_path, max_new_tokens=200)
    config = model_config(checkpoint, generation_config=folder)
    assert defaults(config) == {"temperature": 0.0, "max_tokens": 200}
    assert cap(config) == 200


@pytest.mark.parametrize("in_folder", [False, True], ids=["auto", "folder"])
def test_the_override_caps(checkpoint: Path, tmp_path: Path, in_folder: bool) -> None:
    source = write(tmp_path, max_new_tokens=200, temperature=0.5) if in_folder else "auto"
    override = {"max_new_tokens": 300}
    config = model_config(checkpoint, generation_config=source, override_generation_config=override)
    assert defaults(config) == {"temperature": 0.5, "max_tokens": 300}
    assert cap(config) == 300


def test_null_takes_the_default_away(checkpoint: Path) -> None:
    config = model_config(checkpoint, override_generation_config={"max_new_tokens": None})
    assert defaults(config) == {"temperature": 0.5, "max_tokens": 128}
    assert cap(config) is None


@pytest.mark.parametrize("own_default", [False, True], ids=["built-in", "checkpoint"])
def test_a_default_above_max_canvas_is_lowered(checkpoint: Path, own_default: bool) -> None:
    model = checkpoint if own_default else GOLDEN / "llada-mha"
    config = model_config(model, additional_config={"sparsed": {"max_canvas": 64}})
    assert defaults(config)["max_tokens"] == 64
    assert cap(config) is None


def test_max_canvas_of_a_dense_server_means_nothing(checkpoint: Path) -> None:
    sparsed = {"max_canvas": 64, "enabled": False}
    config = model_config(checkpoint, additional_config={"sparsed": sparsed})
    assert defaults(config)["max_tokens"] == 96


@pytest.mark.parametrize("in_folder", [False, True], ids=["override", "folder"])
def test_a_cap_above_max_canvas_is_refused(tmp_path: Path, in_folder: bool) -> None:
    values = {"max_new_tokens": 65}
    options: dict[str, Any] = (
        {"generation_config": write(tmp_path, **values)}
        if in_folder
        else {"override_generation_config": values}
    )
    named = "--generation-config" if in_folder else "--override-generation-config"
    with pytest.raises(ValueError, match=rf"max_new_tokens of {named} is 65.*max_canvas=64"):
        model_config(additional_config={"sparsed": {"max_canvas": 64}}, **options)


INAPPLICABLE = {"repetition_penalty": 1.1, "min_p": 0.05}


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Warnings of this package; vLLM's loggers do not pass theirs on to pytest's."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.vllm_sparsed"), Collector(logging.WARNING)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.mark.parametrize("in_folder", [False, True], ids=["checkpoint", "folder"])
def test_defaults_that_cannot_apply_are_left_out(
    checkpoint: Path, tmp_path: Path, warnings: list[str], in_folder: bool
) -> None:
    """Usual ones of other families: a plain request is served, with the other defaults."""
    write(tmp_path if in_folder else checkpoint, top_p=0.9, temperature=0.5, **INAPPLICABLE)
    config = model_config(checkpoint, generation_config=str(tmp_path) if in_folder else "auto")
    assert defaults(config) == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 128}
    (warning,) = (text for text in warnings if "left out" in text)
    assert "repetition_penalty=1.1, min_p=0.05" in warning


def test_defaults_that_change_nothing_are_no_matter(checkpoint: Path, warnings: list[str]) -> None:
    write(checkpoint, temperature=0.5, repetition_penalty=1.0, min_p=0.0)
    assert defaults(model_config(checkpoint))["max_tokens"] == 128
    assert not any("left out" in text for text in warnings)


@pytest.mark.parametrize("option", INAPPLICABLE)
def test_an_override_that_cannot_apply_is_refused(option: str) -> None:
    override = {option: INAPPLICABLE[option]}
    with pytest.raises(ValueError, match=f"{option} of --override-generation-config is"):
        model_config(override_generation_config=override)


@pytest.mark.parametrize("bad", [{"temperature": 3.0}, {"top_p": 0.0}])
def test_defaults_that_no_request_could_use_are_refused(
    checkpoint: Path, bad: dict[str, float]
) -> None:
    (option,) = bad
    write(checkpoint, **bad)
    with pytest.raises(ValueError, match=f"sampling defaults .* are not valid: {option} must be"):
        model_config(checkpoint)
