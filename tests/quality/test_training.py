"""The trained model: its forward pass, its files, and a training that stops and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.reference.models import ReferenceModel
from small_model.training.checkpoint import PART_BYTES, load_checkpoint
from small_model.training.data import Stage
from small_model.training.model import Model, Shape, save_served_model
from small_model.training.optimizers import StackedMuon
from small_model.training.train import SMOKE, Settings, Training, run
from vllm_sparsed.models.checkpoint_check import check_supported
from vllm_sparsed.models.checkpoint_config import LLaDAConfig

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    Stage(1, 96, False, 0.5, (("multi_key", 1.0),)),
    Stage(2, 320, False, 0.5, (("multi_key", 0.5), ("report", 0.5))),
)
TINY = replace(SMOKE, batch_tokens=768, learning_rate=3e-3, stages=STAGES)
CPU = torch.device("cpu")


def start(folder: Path, tokenizer: Path, settings: Settings = TINY) -> Training:
    shutil.copytree(tokenizer, folder / "model", dirs_exist_ok=True)
    return Training(settings, folder, CPU)


def train(training: Training, steps: int) -> None:
    run(training, workers=0, stop_at=steps, quiet=True)


def test_loss_falls(tmp_path: Path, tokenizer_folder: Path) -> None:
    train(start(tmp_path, tokenizer_folder), 80)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert list(losses) == [20, 40, 60, 80]
    # From the vocabulary's entropy, 7.6, to the digits' and below a third of it.
    assert losses[20] > 4
    assert losses[80] < 2.5
    assert log[-1]["event"] == "saved at step 80"


def test_going_on_is_bit_identical(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Stopped between two looks at the counts, in two stages."""
    straight = start(tmp_path / "straight", tokenizer_folder)
    straight.curriculum.stage = 1
    train(straight, 30)
    first = start(tmp_path / "parts", tokenizer_folder)
    first.curriculum.stage = 1
    train(first, 13)
    second = Training(TINY, tmp_path / "parts", CPU)
    assert second.step == 13
    assert second.curriculum == first.curriculum
    train(second, 30)

    wanted, state = load_checkpoint(tmp_path / "straight" / "checkpoint")
    got, other = load_checkpoint(tmp_path / "parts" / "checkpoint")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert {**state, "seconds": 0} == {**other, "seconds": 0}
    assert sum(state["curriculum"]["asked"]) > 0
    served = [tmp_path / run / "model" / "model.safetensors" for run in ("straight", "parts")]
    assert served[0].read_bytes() == served[1].read_bytes()


def test_stacked_muon_is_that_of_pytorch() -> None:
    torch.manual_seed(0)
    shapes = [(24, 40), (24, 40), (40, 24), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    options = dict(lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
    optimizers = (StackedMuon(ours, **options), torch.optim.Muon(theirs, **options))
    for _ in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        # Both iterate in bfloat16; an update has elements of some 0.02.
        assert (mine - other).abs().max() < 2e-3
        assert (mine - other).abs().mean() < 2e-4


def test_a_crash_while_saving_loses_nothing(tmp_path: Path, tokenizer_folder: Path) -> None:
    train(start(tmp_path, tokenizer_folder), 3)
    # As it is after the old checkpoint was moved away and before the new one came.
    (tmp_path / "checkpoint").rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    training = Training(TINY, tmp_path, CPU)
    assert training.step == 3
    training.save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "log.jsonl", "model"]


def test_refuses_other_settings(tmp_path: Path, tokenizer_folder: Path) -> None:
    train(start(tmp_path, tokenizer_folder), 2)
    with pytest.raises(ValueError, match="holds a training with other settings"):
        Training(replace(TINY, seed=1), tmp_path, CPU)


def test_learning_rate(tmp_path: Path, tokenizer_folder: Path) -> None:
    """Rises over the first steps, falls over the last 30% to a twentieth."""
    training = start(tmp_path, tokenizer_folder, replace(TINY, steps=100))
    rates = []
    while not training.finished:
        rates.append(training.rate() / TINY.learning_rate)
        training.step += 1
    assert len(rates) == 100
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:71] == [1.0] * 61
    assert rates[71:] == pytest.approx([1 - 0.95 * n / 30 for n in range(1, 30)])


def test_ends_at_its_last_step(tmp_path: Path, tokenizer_folder: Path) -> None:
    training = start(tmp_path, tokenizer_folder, replace(TINY, steps=7))
    run(training, workers=0, quiet=True)
    assert training.step == 7
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["event"] == "saved at step 7, finished"
    run(training, workers=0, quiet=True)
    assert training.step == 7


def test_stops_after_some_minutes(tmp_path: Path, tokenizer_folder: Path) -> None:
    training = start(tmp_path, tokenizer_folder)
    run(training, workers=0, stop_after=0.0, quiet=True)
    assert training.step == 1
    assert not training.finished


def test_ctrl_c_saves(tmp_path: Path) -> None:
    """To the whole process group, as a terminal sends it."""
    command = [sys.executable, "-m", "small_model.training.train", "--output", tmp_path / "run"]
    command += ["--smoke", "--device", "cpu", "--workers", "1", "--steps", "1000000"]
    process = subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and '"loss"' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "no step was logged"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert found is not None
    step = found[1]["step"]
    assert step >= 20
    assert f"saved at step {step}" in output


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The shipped shape with its optimizer, one step old."""
    folder = tmp_path_factory.mktemp("full")
    settings = Settings(batch_tokens=96, stages=STAGES)
    train(start(folder, tokenizer_folder, settings), 1)
    return folder


def test_sizes(full_size: Path) -> None:
    parts = [path.stat().st_size for path in (full_size / "checkpoint").iterdir()]
    assert max(parts) < 15_000_000
    assert 45_000_000 < sum(parts) < 80_000_000
    assert PART_BYTES < 15_000_000
    served = sum(path.stat().st_size for path in (full_size / "model").iterdir())
    assert 11_000_000 < served < 24_000_000


def test_serving_knows_the_configuration(full_size: Path) -> None:
    config = LLaDAConfig.from_pretrained(full_size / "model")
    check_supported(config)
    assert config.architectures == ["LLaDAModelLM"]
    assert config.hidden_size // config.num_attention_heads == 64
    assert config.max_position_embeddings == 8192
    assert config.tie_word_embeddings is True
    assert (config.mask_token_id, config.eos_token_id) == (0, 2)
    weights = load_file(full_size / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["model.transformer.wte.weight"].shape == (config.vocab_size, 256)


def test_forward_is_that_of_the_reference(tmp_path: Path, tokenizer_folder: Path) -> None:
    torch.manual_seed(0)
    model = Model(Shape(64, d_model=64, n_heads=2, n_layers=2, mlp_hidden_size=96))
    for name, parameter in model.named_parameters():
        # Sums that do not vanish, and what bfloat16 holds, as the file does.
        noise = torch.randn_like(parameter) * (0.2 if "norm" in name else 0.15)
        parameter.data = (parameter.data + noise).bfloat16().float()
    save_served_model(model, tokenizer_folder, tmp_path, mask=0, end=2, turn_end=3)
    tokens = torch.randint(64, (2, 37))
    logits = model(tokens, torch.arange(74)).view(2, 37, 64)
    exact = ReferenceModel.load(tmp_path, torch.float64)
    plain = ReferenceModel.load(tmp_path, torch.float32)
    for row in range(2):
        wanted = exact.logits(tokens[row])[0]
        allowed = (plain.logits(tokens[row])[0] - wanted).abs().max()
        assert wanted.std() > 0.1
        assert (logits[row] - wanted).abs().max() <= 2 * allowed
