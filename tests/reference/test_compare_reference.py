"""The comparison script: its verdicts, and whole runs on the golden checkpoints."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.compare_reference import ReferenceRun, report
from benchmarks.reference.generate import Sampling, Step
from benchmarks.reference.paced import Pace
from benchmarks.reference.served import LogitsSample, ServedRun, Task
from tests.golden.parallel_cases import parallel_cases

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
MASK = 9

CONFIGURATION = """
from transformers import PretrainedConfig

class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
"""

MODELLING = """
from pathlib import Path
from types import SimpleNamespace

from transformers import PreTrainedModel

from .configuration_llada import LLaDAConfig

class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig

    @classmethod
    def from_pretrained(cls, folder, *args, config=None, dtype=None, **kwargs):
        from benchmarks.reference.models import ReferenceModel

        model = cls(config)
        model.plain = ReferenceModel.load(Path(folder), dtype)
        return model

    def forward(self, tokens):
        return SimpleNamespace(logits=self.plain.logits(tokens[0])[0][None])
"""


def task() -> Task:
    return Task(
        model="",
        config={"architectures": ["LLaDAModelLM"], "mask_token_id": MASK},
        prompt=[5],
        canvas=2,
        steps=2,
        block_length=2,
        alg="low_confidence",
        sampling=Sampling(),
        eps=1e-3,
        seed=0,
        sparse=None,
    )


def reference(token_margin: float, order_margin: float) -> ReferenceRun:
    before = torch.tensor([5, MASK, MASK])
    steps = [
        Step(0, before, (2,), (4,), order_margin, token_margin),
        Step(1, torch.tensor([5, MASK, 4]), (1,), (3,), torch.inf, token_margin),
    ]
    sample = LogitsSample(0, before, torch.tensor([1, 2]), torch.zeros(2, 10))
    return ReferenceRun(steps, [sample], [5, 3, 4])


@pytest.mark.parametrize(
    ("after", "token_margin", "order_margin", "status", "message"),
    [
        ([[5, MASK, 4], [5, 3, 4]], 1.0, 1.0, 0, "identical, step by step"),
        ([[5, MASK, 7], [5, 3, 7]], 0.15, 1.0, 0, "first difference at step 0.*a near tie"),
        ([[5, 3, MASK], [5, 3, 4]], 1.0, 0.2, 0, "first difference at step 0.*a near tie"),
        ([[5, MASK, 7], [5, 3, 7]], 1.0, 1.0, 1, "first difference at step 0.*NOT explained"),
        ([[5, MASK, 4], [5, 8, 4]], 1.0, 0.0, 1, "first difference at step 1.*NOT explained"),
    ],
    ids=["identical", "token-tie", "order-tie", "different", "different-later"],
)
def test_verdict(
    after: list[list[int]],
    token_margin: float,
    order_margin: float,
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served = ServedRun(after, [torch.full((2, 10), 0.1)], after[-1][1:])
    assert report(task(), reference(token_margin, order_margin), served) == status
    printed = capsys.readouterr().out
    assert pytest.approx(0.1) == float(printed.split("step    0:")[1].split()[0])
    assert [line for line in printed.splitlines() if all(m in line for m in message.split(".*"))]


@pytest.mark.parametrize(
    ("pace", "order_margin", "near"),
    [
        (Pace("threshold", 0.5, 2), 0.2, True),
        (Pace("threshold", 0.5, 2), 0.3, False),
        (Pace("entropy_bound", 1.0, 2), 0.6, True),
        (Pace("entropy_bound", 1.0, 2), 0.7, False),
    ],
)
def test_margins_below_rounding_are_marked(
    pace: Pace, order_margin: float, near: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    served = ServedRun([[5, 3, MASK], [5, 3, 4]], [torch.full((2, 10), 0.1)], [3, 4])
    paced = replace(task(), pace=pace)
    assert report(paced, reference(1.0, order_margin), served) == (not near)
    printed = capsys.readouterr().out
    assert ("0:~2=4" in printed) == near
    assert "2 passes, 1.00 tokens each; in" in printed


@pytest.mark.slow
def test_golden_checkpoint_with_a_pace() -> None:
    case = parallel_cases("llada-mha")[0]
    command = [
        *(sys.executable, "-m", "benchmarks.compare_reference", str(GOLDEN / "llada-mha")),
        *("--prompt-ids", ",".join(map(str, case.prompt)), "--dtype", "float32"),
        *("--canvas", str(case.canvas), "--device", "cpu"),
        *("--block-length", str(case.extra_args["diffusion_block_length"])),
        *("--threshold", str(case.extra_args["diffusion_threshold"])),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"vLLM:      {case.expected}" in done.stdout
    assert f"\n{len(case.history)} passes, " in done.stdout
    assert "identical, step by step" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "transformers"])
def test_golden_checkpoint(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "llada-mha", folder)
    if kind == "transformers":
        (folder / "configuration_llada.py").write_text(CONFIGURATION)
        (folder / "modeling_llada.py").write_text(MODELLING)
    case = json.loads((folder / "expected.json").read_text())[3]
    params = case["params"]
    command = [
        *(sys.executable, "-m", "benchmarks.compare_reference", str(folder)),
        *("--prompt-ids", ",".join(map(str, case["prompt_token_ids"])), "--dtype", "float32"),
        *("--canvas", str(params["gen"]), "--steps", str(params["steps"])),
        *("--block-length", str(params["block"]), "--device", "cpu"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"reference: {kind}," in done.stdout
    assert f"reference: {case['output_token_ids']}" in done.stdout
    assert f"vLLM:      {case['output_token_ids']}" in done.stdout
    assert "identical, step by step" in done.stdout
