"""Mask and ends of text come from config.json, the tokenizer or the registry; none is guessed."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_sparsed.models import special_tokens
from vllm_sparsed.models.checkpoint_config import DreamConfig, LLaDAConfig
from vllm_sparsed.models.registry import ENTRIES, MODELS
from vllm_sparsed.models.special_tokens import (
    end_of_turn_token,
    set_special_tokens,
    with_end_tokens,
)


class Tokenizer(SimpleNamespace):
    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = vars(self).get("vocabulary", {})
        return vocabulary


def model_config(config: Any, architecture: str = "LLaDAModelLM", **generation: Any) -> Any:
    return SimpleNamespace(
        hf_config=config,
        architecture=architecture,
        skip_tokenizer_init=True,
        try_get_generation_config=lambda: generation,
    )


def give_tokenizer(monkeypatch: pytest.MonkeyPatch, **attributes: Any) -> None:
    monkeypatch.setattr(special_tokens, "_tokenizer", lambda _: Tokenizer(**attributes))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.architecture)
def test_registry_answers_for_the_published_vocabulary_alone(entry: Any) -> None:
    config = SimpleNamespace(vocab_size=entry.vocab_size, mask_token_id=None)
    set_special_tokens(model_config(config, entry.architecture))
    assert (config.mask_token_id, config.eos_token_id) == (entry.mask_token_id, entry.eos_token_id)
    other = SimpleNamespace(vocab_size=entry.vocab_size + 64, eos_token_id=7)
    with pytest.raises(ValueError, match=r"--hf-overrides '\{\"mask_token_id\": \.\.\.\}'"):
        set_special_tokens(model_config(other, entry.architecture))
    other = SimpleNamespace(vocab_size=entry.vocab_size + 64, mask_token_id=7)
    with pytest.raises(ValueError, match=r"--hf-overrides '\{\"eos_token_id\": \.\.\.\}'"):
        set_special_tokens(model_config(other, entry.architecture))


def test_config_wins_over_the_tokenizer_and_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    give_tokenizer(monkeypatch, mask_token_id=8, eos_token_id=9)
    config = LLaDAConfig(mask_token_id=5, eos_token_id=2)
    set_special_tokens(model_config(config))
    assert (config.mask_token_id, config.eos_token_id, config.end_token_ids) == (5, 2, [])


@pytest.mark.parametrize(
    "declared",
    [{"mask_token_id": 8}, {"mask_token_id": None, "vocabulary": {"<|mdm_mask|>": 8}}],
    ids=["declared", "in-the-vocabulary"],
)
def test_tokenizer_wins_over_the_registry(
    declared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    give_tokenizer(monkeypatch, eos_token_id=9, **declared)
    config = LLaDAConfig()
    set_special_tokens(model_config(config))
    assert (config.mask_token_id, config.eos_token_id) == (8, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_token_id": 384}, "mask_token_id=384 must be a token id below .* 384"),
        ({"mask_token_id": -1}, "mask_token_id=-1 must"),
        ({"mask_token_id": True}, "mask_token_id=True must"),
        ({"mask_token_id": 2}, "mask_token_id=2 is also an end of text"),
        ({"mask_token_id": 3, "eos_token_id": [2, 3]}, "mask_token_id=3 is also an end of text"),
        ({"eos_token_id": 384}, "eos_token_id=384 must"),
        ({"eos_token_id": [2, 400]}, "eos_token_id=400 must"),
        ({"eos_token_id": []}, "eos_token_id"),
    ],
    ids=str,
)
def test_bad_tokens_are_refused(changes: dict[str, Any], message: str) -> None:
    config = LLaDAConfig(**{"vocab_size": 384, "mask_token_id": 383, "eos_token_id": 2, **changes})
    with pytest.raises(ValueError, match=f"LLaDAModelLM: .*{message}"):
        set_special_tokens(model_config(config))


def test_the_first_of_several_ends_is_the_end_of_text() -> None:
    config = LLaDAConfig(vocab_size=384, mask_token_id=383, eos_token_id=[7, 2])
    # vLLM may ask again.
    for _ in range(2):
        set_special_tokens(model_config(config))
        assert config.eos_token_id == 7
        assert config.end_token_ids == [7, 2]


def test_all_ends_stop_a_request() -> None:
    params = SamplingParams(stop_token_ids=[9])
    stopping = with_end_tokens(params, [7, 2])
    assert (stopping.stop_token_ids, params.stop_token_ids) == ([9, 7, 2], [9])
    # A request that was queued before has them; vLLM stops at the end of text by itself.
    params.update_from_generation_config({}, eos_token_id=7)
    assert with_end_tokens(params, [7, 2]).stop_token_ids == [9, 2]
    assert with_end_tokens(params, []) is params
    ignoring = SamplingParams(ignore_eos=True)
    assert with_end_tokens(ignoring, [7, 2]) is ignoring


@pytest.mark.parametrize(
    ("architecture", "text"), [("LLaDAModelLM", "<|eot_id|>"), ("DreamModel", "<|im_end|>")]
)
def test_end_of_turn(architecture: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert MODELS[architecture].end_of_turn == text
    assert end_of_turn_token(model_config(None, architecture)) is None
    give_tokenizer(monkeypatch, vocabulary={text: 11, "<|other|>": 12})
    assert end_of_turn_token(model_config(None, architecture)) == 11


@pytest.mark.parametrize("place", ["config", "generation", "vocabulary"])
def test_dream_on_is_refused(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DreamConfig(**({"expand_token_id": 151667} if place == "config" else {}))
    generation = {"expand_token_id": 151667} if place == "generation" else {}
    vocabulary = {"<|expand|>": 151667} if place == "vocabulary" else {}
    give_tokenizer(monkeypatch, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"DreamOn is not served .* canvas changes its length"):
        set_special_tokens(model_config(config, "DreamModel", **generation))
