"""Counters of steps and density: the files they travel in, and the /metrics page."""

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from safetensors.torch import load_file

from tests.engine.golden_cases import GOLDEN, GoldenCase, load_cases
from tests.engine.http_server import Server
from vllm_sparsed.scheduling.metrics import (
    COUNTERS_KEY,
    StepCounters,
    _collectors,
    export_step_counters,
)

CASES = load_cases("llada-mha")


def config(folder: Path | None, rank: int = 0) -> Any:
    return SimpleNamespace(
        additional_config={} if folder is None else {COUNTERS_KEY: str(folder)},
        parallel_config=SimpleNamespace(data_parallel_index=rank),
    )


def shown(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose counters this process shows."""
    export_step_counters(str(tmp_path))
    yield tmp_path
    collector = _collectors.pop(str(tmp_path), None)
    if collector is not None:
        REGISTRY.unregister(collector)


def _count_elsewhere(folder: Path) -> None:
    StepCounters.for_writing(config(folder, rank=1)).add(100, 200)


def test_ranks_roles_and_processes_are_summed(folder: Path) -> None:
    StepCounters.for_writing(config(folder)).add(3, 4)
    StepCounters.for_writing(config(folder), "patterns").add(0, 0, 30, 100)
    child = multiprocessing.get_context("spawn").Process(target=_count_elsewhere, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert shown("vllm:denoising_steps_total", attention="dense") == 103
    assert shown("vllm:denoising_steps_total", attention="sparse") == 204
    assert shown("vllm:sparsed_kept_blocks_total") == 30
    assert shown("vllm:sparsed_candidate_blocks_total") == 100


def test_counters_grow(folder: Path) -> None:
    counters = StepCounters.for_writing(config(folder))
    for total in range(1, 4):
        counters.add(1, 2)
        assert shown("vllm:denoising_steps_total", attention="dense") == total
        assert shown("vllm:denoising_steps_total", attention="sparse") == 2 * total


@pytest.mark.parametrize("missing", [None, Path("/nowhere/at/all")], ids=["no key", "no folder"])
def test_no_folder_is_no_error(missing: Path | None) -> None:
    StepCounters.for_writing(config(missing)).add(1, 1)


def test_a_half_written_file_is_left_out(folder: Path) -> None:
    StepCounters.for_writing(config(folder)).add(5, 6)
    (folder / "scheduler-9").write_bytes(b"\0" * 8)
    assert shown("vllm:denoising_steps_total", attention="dense") == 5


def test_a_second_engine_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    StepCounters.for_writing(config(folder)).add(5, 6)
    other = tmp_path / "other"
    other.mkdir()
    export_step_counters(str(other))
    assert shown("vllm:denoising_steps_total", attention="dense") == 0
    REGISTRY.unregister(_collectors.pop(str(other)))


def counters_of(server: Server) -> dict[str, float]:
    return {
        "dense": server.metric("vllm:denoising_steps_total", attention="dense"),
        "sparse": server.metric("vllm:denoising_steps_total", attention="sparse"),
        "kept": server.metric("vllm:sparsed_kept_blocks_total"),
        "candidates": server.metric("vllm:sparsed_candidate_blocks_total"),
        "generated": server.metric("vllm:generation_tokens_total"),
        "prompt": server.metric("vllm:prompt_tokens_total"),
    }


# int(steps * skip) + 2 steps are dense, the last of them builds the patterns.
DENSE_STEPS = {0: 16, 3: 32, 4: 5, 6: 8, 7: 3}


@pytest.mark.parametrize("case", [CASES[i] for i in DENSE_STEPS], ids=lambda case: case.name)
def test_served_request_is_counted(server: Server, case: GoldenCase) -> None:
    before = counters_of(server)
    assert server.complete(case)["token_ids"] == case.expected
    after = counters_of(server)
    grown = {key: after[key] - before[key] for key in before}
    kept = candidates = 0
    if case.block_mask is not None:
        mask = load_file(GOLDEN / "block_masks.safetensors")[case.block_mask]
        kept, candidates = int(mask.sum()), mask.numel()
    assert grown == {
        "dense": DENSE_STEPS[case.index],
        "sparse": case.params["steps"] - DENSE_STEPS[case.index],
        "kept": kept,
        "candidates": candidates,
        "generated": len(case.expected),
        "prompt": len(case.prompt),
    }
