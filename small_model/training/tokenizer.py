"""A small byte-level BPE tokenizer of our own, with LLaDA's special tokens and chat template.

Text splits before BPE into digits, words with the space before them, punctuation and line
breaks. So encoding line by line gives the same tokens as encoding the whole, which training relies
on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from small_model.tasks import TASKS, Limits, make_document

VOCAB_SIZE: Final = 2048  # at most
MASK: Final = "<|mdm_mask|>"
START: Final = "<|startoftext|>"
END: Final = "<|endoftext|>"
TURN_END: Final = "<|eot_id|>"
HEADER_START: Final = "<|start_header_id|>"
HEADER_END: Final = "<|end_header_id|>"
SPECIAL_TOKENS: Final = (MASK, START, END, TURN_END, HEADER_START, HEADER_END)

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
_PIECES: Final = r"\d|\n+| ?\p{L}+| ?[^\s\p{L}\d]+|\s"
_DOCUMENT_CHARACTERS: Final = 8000
_DOCUMENTS_PER_TASK: Final = 40
# Tasks draw keys at random: every word has to be seen, whatever the seed.
_OTHER_TEXT: Final = "user\n\nassistant\n\nsystem\n\n"


def training_text(seed: int) -> Iterator[str]:
    """Documents and questions of every task, from the training split."""
    limits = Limits(tokens=_DOCUMENT_CHARACTERS, count=len, asked=None)
    for task in TASKS:
        for number in range(_DOCUMENTS_PER_TASK):
            document = make_document(task, "train", seed + number, limits)
            yield document.text
            for question in document.questions:
                yield question.text
                yield question.answer
            yield _OTHER_TEXT


def train_tokenizer(folder: Path, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Train on generated text and write tokenizer.json and tokenizer_config.json.

    Args:
        folder: made where it is missing.
        seed: of the documents.
        vocab_size: at most; the special tokens come first, then the 256 bytes.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(_PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(seed), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "mask_token": MASK,
        "additional_special_tokens": [TURN_END, HEADER_START, HEADER_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return tokenizer
