"""Counters of steps and density: the files they travel in, and the /metrics page."""

import asyncio
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, multiprocess
from safetensors.torch import load_file
from vllm.benchmarks.serve import fetch_diffusion_metrics

from tests.engine.golden_cases import GOLDEN, GoldenCase, load_cases
from tests.engine.http_server import Server
from vllm_sparsed.scheduling.metrics import (
    COUNTERS_KEY,
    MULTIPROCESS_FOLDER,
    STEPS,
    StepCounters,
    _collectors,
    export_step_counters,
)
from vllm_sparsed.worker.step_output import StepReport

CASES = load_cases("llada-mha")
DENSE = StepReport("dense", candidates=32, decided=2)
BUILDING = StepReport("building", candidates=30, decided=2, kept_blocks=30, pattern_blocks=100)
SPARSE = StepReport("sparse", candidates=28, decided=3)


def config(folder: Path | None, rank: int = 0) -> Any:
    return SimpleNamespace(
        additional_config={} if folder is None else {COUNTERS_KEY: str(folder)},
        parallel_config=SimpleNamespace(data_parallel_index=rank),
        model_config=SimpleNamespace(served_model_name="a-model"),
    )


def shown(name: str, rank: int = 0, **labels: str) -> float | None:
    labels = {"model_name": "a-model", "engine": str(rank), **labels}
    return REGISTRY.get_sample_value(f"{name}_total", labels)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose counters this process shows."""
    monkeypatch.delenv(MULTIPROCESS_FOLDER, raising=False)
    export_step_counters(str(tmp_path))
    yield tmp_path
    collector = _collectors.pop(str(tmp_path), None)
    if collector is not None:
        REGISTRY.unregister(collector)


def _count_elsewhere(folder: Path) -> None:
    counters = StepCounters.for_writing(config(folder, rank=1))
    for report in (DENSE, BUILDING, SPARSE, SPARSE):
        counters.add(report, 32)


def _count_in_another_process(folder: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_count_elsewhere, args=(folder,))
    child.start()
    child.join()
    assert child.exitcode == 0


def test_engines_and_processes_have_labels(folder: Path) -> None:
    StepCounters.for_writing(config(folder)).add(DENSE, 32)
    _count_in_another_process(folder)
    assert [shown(STEPS, attention=a) for a in ("dense", "building", "sparse")] == [1, 0, 0]
    assert [shown(STEPS, 1, attention=a) for a in ("dense", "building", "sparse")] == [1, 1, 2]
    assert shown("vllm:diffusion_num_canvas_positions", 1) == 4 * 32
    assert shown("vllm:diffusion_num_committed_tokens", 1) == 2 + 2 + 3 + 3
    assert shown("vllm:diffusion_num_candidates", 1) == 32 + 30 + 28 + 28
    assert shown("vllm:sparsed_kept_blocks", 1) == 30
    assert shown("vllm:sparsed_candidate_blocks", 1) == 100


def test_several_front_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Prometheus' multiprocess mode any process shows what all have counted."""
    monkeypatch.setenv(MULTIPROCESS_FOLDER, str(tmp_path))
    counters = StepCounters.for_writing(config(None))
    counters.add(SPARSE, 32)
    counters.add(SPARSE, 32)
    _count_in_another_process(tmp_path / "nowhere")
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    page = generate_latest(registry).decode().splitlines()
    labels = 'attention="sparse",engine="{}",model_name="a-model"'
    for rank in (0, 1):
        assert f"{STEPS}_total{{{labels.format(rank)}}} 2.0" in page
    assert 'vllm:sparsed_kept_blocks_total{engine="1",model_name="a-model"} 30.0' in page


def test_counters_grow(folder: Path) -> None:
    counters = StepCounters.for_writing(config(folder))
    for total in range(1, 4):
        counters.add(DENSE, 32)
        counters.add(SPARSE, 32)
        assert shown(STEPS, attention="dense") == total
        assert shown(STEPS, attention="sparse") == total


@pytest.mark.parametrize("missing", [None, Path("/nowhere/at/all")], ids=["no key", "no folder"])
def test_no_folder_is_no_error(missing: Path | None) -> None:
    StepCounters.for_writing(config(missing)).add(DENSE, 32)


def test_an_engine_that_has_ended_is_no_error(folder: Path) -> None:
    StepCounters.for_writing(config(folder)).add(DENSE, 32)
    shutil.rmtree(folder)
    assert shown(STEPS, attention="dense") is None


def test_a_half_written_file_is_left_out(folder: Path) -> None:
    StepCounters.for_writing(config(folder)).add(DENSE, 32)
    (folder / "9").write_bytes(b"\0" * 8)
    assert shown(STEPS, attention="dense") == 1


def test_a_second_engine_replaces_the_first(folder: Path, tmp_path: Path) -> None:
    StepCounters.for_writing(config(folder)).add(DENSE, 32)
    other = tmp_path / "other"
    other.mkdir()
    export_step_counters(str(other))
    assert shown(STEPS, attention="dense") is None
    REGISTRY.unregister(_collectors.pop(str(other)))


class _Page:
    """What vLLM's benchmark sees of a server: its /metrics page."""

    status = 200

    def get(self, url: str) -> "_Page":
        return self

    async def __aenter__(self) -> "_Page":
        return self

    async def __aexit__(self, *args: object) -> None:
        pass

    async def text(self) -> str:
        return generate_latest(REGISTRY).decode()


def test_vllm_bench_serve_finds_them(folder: Path) -> None:
    counters = StepCounters.for_writing(config(folder))
    for report in (DENSE, BUILDING, SPARSE):
        counters.add(report, 64)
    page: Any = _Page()
    found = asyncio.run(fetch_diffusion_metrics("", page))
    assert found is not None
    assert found.num_denoising_steps == 3
    assert found.num_canvas_positions == 3 * 64
    assert found.num_committed_tokens == 7


def counters_of(server: Server) -> dict[str, float]:
    return {
        "dense": server.metric(f"{STEPS}_total", attention="dense"),
        "building": server.metric(f"{STEPS}_total", attention="building"),
        "sparse": server.metric(f"{STEPS}_total", attention="sparse"),
        "decided": server.metric("vllm:diffusion_num_committed_tokens_total"),
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
    kept = candidates = building = 0
    if case.block_mask is not None:
        mask = load_file(GOLDEN / "block_masks.safetensors")[case.block_mask]
        kept, candidates, building = int(mask.sum()), mask.numel(), 1
    assert grown == {
        "dense": DENSE_STEPS[case.index] - building,
        "building": building,
        "decided": len(case.expected),
        "sparse": case.params["steps"] - DENSE_STEPS[case.index],
        "kept": kept,
        "candidates": candidates,
        "generated": len(case.expected),
        "prompt": len(case.prompt),
    }
