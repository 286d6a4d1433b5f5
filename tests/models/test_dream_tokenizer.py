"""Dream's tokenizer loads without remote code, and tokenizes like Qwen2's."""

import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer
from vllm.config import ModelConfig
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_sparsed.models.dream_tokenizer import register_tokenizers
from vllm_sparsed.plugin import register

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEXT = "hello hello h€ 42 <|mask|>\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder with a small byte-level BPE and Dream's tokenizer_config.json."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello"]
    words = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    end = words.index("<|endoftext|>")
    special = {"lstrip": False, "normalized": False, "rstrip": False, "special": True}
    tokenizer_config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(end): {"content": "<|endoftext|>", "single_word": False, **special},
            str(end + 1): {"content": "<|mask|>", "single_word": False, **special},
        },
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "config.json").write_text((GOLDEN / "dream-gqa" / "config.json").read_text())
    return tmp_path


def test_tokenizer_without_remote_code(folder: Path) -> None:
    register()
    register_tokenizers()
    register_tokenizers()
    config = ModelConfig(str(folder), dtype="float32")
    assert config.trust_remote_code is False
    tokenizer = cached_tokenizer_from_config(config)
    ids = tokenizer.encode(TEXT)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    assert ids[:2] == [vocabulary["hello"], vocabulary["Ġhello"]]
    assert ids[-2:] == [vocabulary["<|endoftext|>"] + 1, vocabulary["Ċ"]]
    assert tokenizer.decode(ids) == TEXT
    assert ids == Qwen2Tokenizer.from_pretrained(folder).encode(TEXT)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>hello"
