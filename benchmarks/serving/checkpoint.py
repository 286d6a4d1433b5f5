"""Gives a shape or a checkpoint without a tokenizer one, so that it can be served as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.requests.random_model import read_config


def with_tokenizer(source: Path, folder: Path) -> Path:
    """Copy a model's configuration and weights and add a tokenizer: token 7 is the word w7.

    Args:
        source: a folder with config.json and possibly weights.
        folder: where the copy goes; must not exist.

    Returns:
        folder, or source where it has a tokenizer of its own.
    """
    if (source / "tokenizer_config.json").exists():
        return source
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    config = read_config(source)
    folder.mkdir(parents=True)
    # Modelling code of the checkpoint is not needed and would be asked for.
    kept = {name: value for name, value in config.items() if name != "auto_map"}
    (folder / "config.json").write_text(json.dumps(kept, indent=1))
    for weights in source.glob("*.safetensors*"):
        shutil.copy(weights, folder / weights.name)
    # vLLM refuses a text longer than that many times its longest token. A word here comes with a
    # space, so these two must be longer than any word.
    mask, end = "<|mdm_mask|>", "<|endoftext|>"
    special = {config["mask_token_id"]: mask, config["eos_token_id"]: end}
    words = {special.get(token, f"w{token}"): token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([mask, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": mask,
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{{ messages | map(attribute='content') | join(' ') }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder
