"""The trained model of this repository: its files, and that it answers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm import LLM

from benchmarks.quality.answering import Asking, answer_cases
from benchmarks.quality.cases import Case, make_cases
from benchmarks.quality.settings import DENSE, Setting
from small_model.tasks import TASKS, is_correct
from small_model.training.curriculum import STAGES
from small_model.training.tokenizer import train_tokenizer
from small_model.training.train import Settings

MODEL = Path(__file__).resolve().parents[2] / "llada-yardstick-6m"
LENGTH = 768
# SparseD's released settings for short contexts.
SPARSE = Setting(select=0.5, skip=0.2, block_size=32)
ASKING = Asking(canvas=32, steps=32)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    """One document for each task but the single needle, which is the easiest."""
    tasks = [task for task in TASKS if task != "single_needle"]
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return make_cases(tokenizer, tasks, [LENGTH], 1, ASKING.canvas)


@pytest.fixture(scope="module")
def engine(cases: list[Case]) -> Iterator[LLM]:
    engine = LLM(
        str(MODEL),
        attention_backend="sparsed",
        dtype="float32",
        max_model_len=LENGTH,
        max_num_batched_tokens=LENGTH * len(cases),
        additional_config={
            "sparsed": {"select": 0.5, "block_size": 32, "max_canvas": ASKING.canvas}
        },
    )
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("setting", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_answers_five_documents(engine: LLM, cases: list[Case], setting: Setting) -> None:
    answers = answer_cases(engine, cases, setting, ASKING)
    wrong = [
        (case.task, answer.text, case.answer)
        for case, answer in zip(cases, answers, strict=True)
        if not is_correct(answer.text, case.answer)
    ]
    assert len(answers) == 5
    assert wrong == []
    decided = [step for answer in answers for step in answer.decided]
    if setting.is_dense:
        assert all(answer.density is None for answer in answers)
    else:
        first = setting.first_sparse_step(ASKING.steps)
        assert sum(step >= first for step in decided) >= 0.6 * len(decided)
        assert all(0.4 < answer.density < 0.7 for answer in answers if answer.density)
        assert all(answer.density is not None for answer in answers)


def test_is_what_the_training_makes(tmp_path: Path) -> None:
    """Of the same tokenizer, shape and lengths as the training in this repository."""
    train_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODEL / name).read_bytes() == (tmp_path / name).read_bytes()
    config = json.loads((MODEL / "config.json").read_text())
    shape = Settings().shape
    for name in ("d_model", "n_heads", "n_layers", "mlp_hidden_size", "rope_theta"):
        assert config[name] == getattr(shape, name)
    assert config["max_sequence_length"] == STAGES[-1].length
    assert config["d_model"] // config["n_heads"] == 64
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 11_000_000
