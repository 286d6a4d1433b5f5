"""The trained tokenizer, on its own and through transformers."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from small_model.tasks import TASKS, Limits, make_document
from small_model.training.data import Encoder
from small_model.training.tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.mark.parametrize(
    "text",
    [
        "The access code of the amber lighthouse is 48213.\n",
        "Zwölf Boxkämpfer\n\n\tjagen 🦊  12.5 % — quer.",
        "",
        "  leading and trailing  ",
    ],
    ids=["task", "other-bytes", "empty", "spaces"],
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_are_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("is 48213, 07"))
    assert [token for token in tokens if token[-1].isdigit()] == list("4821307")


def test_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tuple(tokenizer.convert_ids_to_tokens(range(len(SPECIAL_TOKENS)))) == SPECIAL_TOKENS
    assert len(SPECIAL_TOKENS) + 256 < len(tokenizer) <= VOCAB_SIZE
    assert tokenizer.decode([0, 2, 3], skip_special_tokens=True) == ""
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id) == (0, 2)


def test_training_again_gives_the_same_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    train_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_folder / name).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_lines_encode_as_the_whole(tokenizer_folder: Path, encoder: Encoder, task: str) -> None:
    whole = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    document = make_document(task, "test", 0, Limits(1024, encoder.count))
    question = document.questions[0]
    ids = [token for line in document.lines for token in encoder.encode(line)]
    ids += encoder.encode(question.text)
    assert whole.encode(document.prompt(question)).ids == ids


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": " Who? "},
        {"role": "assistant", "content": "Ada"},
        {"role": "user", "content": "When?"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWho?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nAda<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
