"""The evaluation: its statistics, its prompts, and a whole run through vLLM."""

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.quality.evaluate import (
    Answered,
    Case,
    Row,
    Setting,
    make_cases,
    rows_of,
    wilson_interval,
    write_csv,
)
from benchmarks.quality.tasks import TASKS
from benchmarks.training.data import Stage
from benchmarks.training.train import SMOKE, Budget, Training, run

ROOT = Path(__file__).resolve().parents[2]
SPARSE = Setting(select=0.3, skip=0.2, block_size=32)


@pytest.mark.parametrize(
    ("correct", "asked", "interval"),
    [
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
        (5, 10, (0.23659, 0.76341)),
        (190, 200, (0.91042, 0.97262)),
    ],
    ids=["none", "all", "half", "most"],
)
def test_wilson_interval(correct: int, asked: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(correct, asked) == pytest.approx(interval, abs=1e-4)


def test_wilson_interval_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        wilson_interval(0, 0)


@pytest.mark.parametrize(
    ("setting", "steps", "first"),
    [(Setting(), 32, 32), (SPARSE, 32, 8), (SPARSE, 2, 2), (Setting(0.3, 0.0, 32), 32, 2)],
    ids=["dense", "sparse", "too-few-steps", "no-skip"],
)
def test_first_sparse_step(setting: Setting, steps: int, first: int) -> None:
    assert setting.first_sparse_step(steps) == first


def test_rows(tmp_path: Path) -> None:
    cases = [
        Case("report", 256, [1], "Ada"),
        Case("report", 256, [1], "12345"),
        Case("multi_key", 256, [1], "00000"),
    ]
    answered = [
        Answered("Ada", [7, 8], 20),
        Answered("12346", [8, 9, 10, 11, 2, 30], 32),
        Answered("00000", [0, 1], 12),
    ]
    report, keys = rows_of(SPARSE, cases, answered, 32)
    assert report == Row(
        task="report",
        length=256,
        setting="select 0.3, skip 0.2, block 32",
        select=0.3,
        skip=0.2,
        block_size=32,
        documents=2,
        correct=1,
        exact_match=0.5,
        low=0.0945,
        high=0.9055,
        steps=26.0,
        sparse_tokens=0.75,
    )
    assert (keys.task, keys.correct, keys.sparse_tokens) == ("multi_key", 1, 0.0)
    write_csv(tmp_path / "rows.csv", [report, keys])
    lines = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [line["exact_match"] for line in lines] == ["0.5", "1.0"]


@pytest.mark.parametrize("length", [256, 1024])
def test_prompts_fill_the_length(tokenizer_folder: Path, length: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    cases = make_cases(tokenizer, TASKS, [length], 3, canvas=32)
    assert [case.task for case in cases] == [task for task in TASKS for _ in range(3)]
    for case in cases:
        assert length * 0.8 - 32 < len(case.prompt) + 32 <= length
        text = tokenizer.decode(case.prompt)
        assert text.endswith("?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_prompts_fit_with_a_tokenizer_that_joins_lines(tokenizer_folder: Path) -> None:
    """One that needs more tokens for the whole than for its lines."""
    own = AutoTokenizer.from_pretrained(tokenizer_folder)

    class Longer:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return own.encode(text, add_special_tokens=add_special_tokens)

        def apply_chat_template(self, messages: list[dict[str, str]], **options: bool) -> list[int]:
            ids = own.apply_chat_template(messages, **options)
            return ids + [0] * messages[0]["content"].count("\n")

    (case,) = make_cases(Longer(), ["single_needle"], [512], 1, canvas=32)
    assert 400 < len(case.prompt) + 32 <= 512


@pytest.mark.slow
def test_evaluates_a_trained_model_through_vllm(tmp_path: Path, tokenizer_folder: Path) -> None:
    """A little training gives answers of the right form; what they say is another matter."""
    settings = replace(
        SMOKE, learning_rate=3e-3, stages=(Stage(1, 160, True, (("multi_key", 1.0),)),)
    )
    shutil.copytree(tokenizer_folder, tmp_path / "model")
    training = Training(settings, tmp_path, torch.device("cpu"))
    run(training, Budget(minutes=60.0, max_steps=300), workers=0, quiet=True)
    script = (
        "from pathlib import Path; import json, os, sys\n"
        "os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'] = '0'\n"
        "from vllm import LLM\n"
        "from benchmarks.quality.evaluate import *\n"
        "llm = LLM(sys.argv[1], attention_backend='sparsed', dtype='float32', max_model_len=256,\n"
        "          additional_config={'sparsed': {'select': 0.5, 'block_size': 16}})\n"
        "cases = make_cases(llm.get_tokenizer(), ['multi_key'], [160], 4, 32)\n"
        "answers = {}\n"
        "for setting in (Setting(), Setting(0.5, 0.2, 16)):\n"
        "    answered = answer_cases(llm, cases, setting, 32, 32)\n"
        "    answers[setting.name] = [asdict(a) for a in answered]\n"
        "Path(sys.argv[2]).write_text(json.dumps(answers))\n"
    )
    found = tmp_path / "answers.json"
    subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model", found], check=True, cwd=ROOT, timeout=300
    )
    answers = json.loads(found.read_text())
    assert list(answers) == ["dense", "select 0.5, skip 0.2, block 16"]
    for answered in answers.values():
        assert len(answered) == 4
        for answer in answered:
            assert answer["text"].isdigit()
            assert len(answer["text"]) == 5
            assert len(answer["decided"]) in (5, 6)
            # One token in a step, and none of them twice.
            assert len(set(answer["decided"])) == len(answer["decided"])
            assert max(answer["decided"]) < answer["steps"] <= 32
