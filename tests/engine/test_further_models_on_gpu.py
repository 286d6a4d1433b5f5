"""iLLaDA and LLaDA-MoE on a GPU: logits against plain PyTorch, and fp8."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.engine.denoising_engine import EngineOptions, start_engine, stop_engine
from benchmarks.reference.served import dense_logits
from tests.models.checkpoints import ILLADA, LLADA_MOE, reference, write_checkpoint

pytestmark = pytest.mark.gpu

CONFIGS = pytest.mark.parametrize(
    "config", [ILLADA, LLADA_MOE], ids=lambda config: config["architectures"][0]
)
TOKENS = [10 + (11 * i) % 300 for i in range(150)]


def served_logits(folder: Path, dtype: str, quantization: str | None = None) -> Tensor:
    """Of all positions of TOKENS, in float64."""
    options = EngineOptions(
        str(folder),
        max_length=640,
        canvas=128,
        block_size=16,
        dtype=dtype,
        quantization=quantization,
        load_format="auto",
        more={"gpu_memory_utilization": 0.3},
    )
    llm = start_engine(options)
    try:
        rows = list(range(len(TOKENS)))
        logits: Tensor = llm.collective_rpc(dense_logits, args=(TOKENS, rows))[0]
    finally:
        stop_engine(llm)
    return logits.double().cpu()


@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits(config: Mapping[str, Any], dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config)
    logits = served_logits(folder, dtype)
    tokens = torch.tensor(TOKENS)
    exact = reference(folder, torch.float64).logits(tokens)[0]
    if dtype == "float32":
        torch.testing.assert_close(logits, exact, atol=1e-4, rtol=1e-4)
        return
    plain = reference(folder, torch.bfloat16).logits(tokens)[0].double()
    # The largest error depends on which experts rounding chooses.
    ours, usual = ((x - exact).abs().amax(dim=-1).quantile(0.75) for x in (logits, plain))
    assert ours <= 2 * usual
    assert (logits - exact).abs().mean() <= 2 * (plain - exact).abs().mean()


@CONFIGS
def test_fp8(config: Mapping[str, Any], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, config)
    logits = served_logits(folder, "bfloat16", "fp8")
    exact = reference(folder, torch.float64).logits(torch.tensor(TOKENS))[0]
    # Unrelated logits are 1.41 apart.
    assert (logits - exact).norm() < 0.5 * exact.norm()
