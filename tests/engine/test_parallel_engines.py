"""Several devices, engines and front ends, and the extremes of the batch size, on CPUs."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine.golden_cases import GoldenCase, load_cases
from tests.engine.http_server import MODEL_NAME, Server, completion_body, make_checkpoint, serve
from tests.engine.reuse_cases import ReuseCase, load_reuse_cases
from tests.golden.parallel_cases import ParallelCase, parallel_cases


def assert_golden(
    server: Server, cases: list[GoldenCase] | list[ParallelCase] | list[ReuseCase]
) -> None:
    """All at once."""
    with ThreadPoolExecutor(len(cases)) as pool:
        answers = list(pool.map(lambda case: server.complete(case)["token_ids"], cases))
    assert answers == [case.expected for case in cases]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        # Two key heads: one for each rank. A batch of one request after the other.
        ("dream-gqa", ["--max-num-seqs", "1"]),
        # A budget of tokens below the context is raised to it.
        ("llada-mha", ["--max-num-batched-tokens", "1"]),
    ],
    ids=["dream-gqa", "llada-mha"],
)
def test_tensor_parallel(model: str, options: list[str], tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, model)
    log = tmp_path / "log"
    with serve(checkpoint, log, "--tensor-parallel-size", "2", *options) as server:
        assert_golden(server, load_cases(model))
        assert_golden(server, parallel_cases(model))
        assert_golden(server, load_reuse_cases(model))
        assert server.metric("vllm:kv_cache_usage_perc") == 0
    assert log.read_text().count("SparseD: skip") == 1, "by the first rank alone"
    raised = "max_num_batched_tokens raised from 1 to max_model_len=640" in log.read_text()
    assert raised == ("--max-num-batched-tokens" in options)


@pytest.fixture(scope="module")
def two_engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines behind two front ends, with a token budget that nothing fills."""
    folder = tmp_path_factory.mktemp("two")
    options = ("--data-parallel-size", "2", "--api-server-count", "2")
    budget = ("--max-num-batched-tokens", "20000")
    with serve(make_checkpoint(folder), folder / "log", *options, *budget) as server:
        yield server


def test_data_parallel(two_engines: Server) -> None:
    assert_golden(two_engines, 2 * load_cases("llada-mha"))
    engines = [
        two_engines.metric("vllm:request_success_total", engine=str(rank)) for rank in (0, 1)
    ]
    assert min(engines) > 0, "both engines had work"


@pytest.mark.parametrize("attempt", range(4))
def test_every_front_end_refuses_bad_parameters(two_engines: Server, attempt: int) -> None:
    """Which of the two answers is chance: a new connection each time."""
    body = completion_body(load_cases("llada-mha")[0], vllm_xargs={"diffusion_steps": 0})
    response = two_engines.post("/v1/completions", body)
    assert response.status_code == 400
    assert "diffusion_steps" in response.text


def test_step_counters_of_every_engine_are_shown(two_engines: Server) -> None:
    """Whichever front end answers: vLLM has Prometheus add up what each process writes."""
    name = "vllm:diffusion_num_denoising_steps_total"
    before = two_engines.metric(name)
    cases = load_cases("llada-mha")
    assert_golden(two_engines, cases)
    assert two_engines.metric(name) - before == sum(case.params["steps"] for case in cases)
    for rank in ("0", "1"):
        assert two_engines.metric(name, engine=rank, model_name=MODEL_NAME) > 0
