"""The mask token and the tokens that end a text: from config.json, the tokenizer or the registry.

A mask id is never guessed: a wrong one gives garbage without an error.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_sparsed.models.registry import DREAM_ON, MODELS, ModelEntry

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.sampling_params import SamplingParams

_EXPAND = "expand_token_id"


def set_special_tokens(model_config: "ModelConfig") -> None:
    """Make `mask_token_id` and `eos_token_id` of the model's configuration one token id each.

    Where config.json has several ends, the first is the end of text; all of them are in the
    configuration's new `end_token_ids`, which is empty where config.json names one or none.

    Raises:
        ValueError: nobody says the token, it is outside the vocabulary, or the mask ends the text.
    """
    config = model_config.hf_config
    entry = MODELS[model_config.architecture]
    tokenizer = _tokenizer(model_config)
    if entry.architecture == "DreamModel":
        _refuse_expanding_canvas(model_config, tokenizer)
    published = config.vocab_size == entry.vocab_size
    # vLLM may ask twice.
    ends = getattr(config, "end_token_ids", None) or getattr(config, "eos_token_id", None)
    if ends is None:
        ends = getattr(tokenizer, "eos_token_id", None)
    if ends is None and published:
        ends = entry.eos_token_id
    several = isinstance(ends, (list, tuple))
    end_ids = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if not end_ids:
        raise ValueError(_missing(entry, "eos_token_id", "end of text"))
    for token in end_ids:
        _check(entry, "eos_token_id", "end of text", token, config.vocab_size)
    mask = getattr(config, "mask_token_id", None)
    if mask is None:
        mask = _mask_of_tokenizer(tokenizer, entry)
    if mask is None and published:
        mask = entry.mask_token_id
    _check(entry, "mask_token_id", "mask", mask, config.vocab_size)
    if mask in end_ids:
        raise ValueError(
            f"{entry.architecture}: mask_token_id={mask} is also an end of text "
            f"(eos_token_id={ends}); give the right one with "
            "--hf-overrides '{\"mask_token_id\": ...}'."
        )
    config.mask_token_id = mask
    config.eos_token_id = end_ids[0]
    config.end_token_ids = end_ids if several else []


def with_end_tokens(params: "SamplingParams", end_token_ids: Sequence[int]) -> "SamplingParams":
    """`params` or a copy of them that stops at all of the checkpoint's ends of text."""
    known = {params.eos_token_id, *(params.stop_token_ids or ())}
    missing = [token for token in end_token_ids if token not in known]
    if params.ignore_eos or not missing:
        return params
    stopping = params.clone()
    stopping.stop_token_ids = [*(params.stop_token_ids or ()), *missing]
    return stopping


def end_of_turn_token(model_config: "ModelConfig") -> int | None:
    """Id of the token that ends a turn of a chat, if the tokenizer knows it."""
    vocabulary = _vocabulary(_tokenizer(model_config))
    return vocabulary.get(MODELS[model_config.architecture].end_of_turn)


def _tokenizer(model_config: "ModelConfig") -> Any:
    if model_config.skip_tokenizer_init:
        return None
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(model_config)


def _vocabulary(tokenizer: Any) -> dict[str, int]:
    return {} if tokenizer is None else tokenizer.get_vocab()


def _mask_of_tokenizer(tokenizer: Any, entry: ModelEntry) -> int | None:
    token: int | None = getattr(tokenizer, "mask_token_id", None)
    return _vocabulary(tokenizer).get(entry.mask_text) if token is None else token


def _refuse_expanding_canvas(model_config: "ModelConfig", tokenizer: Any) -> None:
    """DreamOn has Dream's architecture and a token that asks for a longer canvas."""
    stated = {**vars(model_config.hf_config), **model_config.try_get_generation_config()}
    if stated.get(_EXPAND) is not None or "<|expand|>" in _vocabulary(tokenizer):
        raise ValueError(DREAM_ON.refusal)


def _check(entry: ModelEntry, key: str, meaning: str, token: Any, vocab_size: int) -> None:
    if token is None:
        raise ValueError(_missing(entry, key, meaning))
    if type(token) is not int or not 0 <= token < vocab_size:
        raise ValueError(
            f"{entry.architecture}: {key}={token!r} must be a token id below the vocabulary size "
            f"{vocab_size}; give the right one with --hf-overrides '{{\"{key}\": ...}}'."
        )


def _missing(entry: ModelEntry, key: str, meaning: str) -> str:
    return (
        f"{entry.architecture}: neither config.json nor the tokenizer says which token is the "
        f"{meaning}; give its id with --hf-overrides '{{\"{key}\": ...}}'."
    )
