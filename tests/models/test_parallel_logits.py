"""The same logits from two tensor-parallel ranks, with experts cut up or spread over them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.checkpoints import ILLADA, LLADA_MOE, reference, write_checkpoint
from tests.models.test_forward import sequences

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2


def run_ranks(folder: Path, output: Path, *kind: str) -> list[tuple[list[torch.Tensor], Any]]:
    """What each rank computed, and how many elements each of its parameters has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = output.with_name("rendezvous")
    started = []
    for rank in range(RANKS):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": f"{RANKS}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": f"{port}",
            # vLLM names its shared memory by it.
            "VLLM_DIST_IDENT": f"test{port}",
        }
        arguments = [folder, f"{rank}", f"{RANKS}", rendezvous, output, *kind]
        command = [sys.executable, "-m", "tests.models.parallel_logits", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
    for process in started:
        printed = process.communicate(timeout=300)[0]
        assert process.returncode == 0, printed[-4000:]
    return [torch.load(f"{output}-{rank}") for rank in range(RANKS)]


@pytest.mark.parametrize(
    ("config", "kind"),
    [(ILLADA, ()), (LLADA_MOE, ()), (LLADA_MOE, ("expert",))],
    ids=["illada", "llada-moe", "llada-moe-experts-spread"],
)
def test_two_ranks(config: Mapping[str, Any], kind: tuple[str, ...], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", config)
    results = run_ranks(folder, tmp_path / "logits", *kind)
    exact = reference(folder, torch.float32)
    for logits, sizes in results:
        for tokens, computed in zip(sequences(), logits, strict=True):
            expected = exact.logits(tokens)[0]
            torch.testing.assert_close(computed, expected, atol=1e-4, rtol=1e-4)
        if config is LLADA_MOE:
            # Half of the experts, or half of each.
            total = 16 * 2 * 64 * 128
            assert sizes["model.layers.0.mlp.experts.routed_experts.w13_weight"] == total / 2
