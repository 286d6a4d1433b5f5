"""Passes that are recorded and replayed give the same tokens; on a CPU a replay runs the pass again
on the recorded tensors, which is all that a CUDA graph does."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from tests.engine.golden_cases import MODELS, load_cases
from tests.engine.golden_engine import start_golden
from tests.engine.inspection import MAX_BATCH_TOKENS, MAX_MODEL_LEN, Rerun, runner_of
from tests.engine.test_golden import generate
from tests.engine.test_guidance import guided
from vllm_sparsed.worker import cuda_graphs
from vllm_sparsed.worker.model_runner import DenoisingModelRunner
from vllm_sparsed.worker.packing import PackedBatch


@pytest.fixture
def recording(engine: Callable[..., LLM]) -> Iterator[Callable[..., DenoisingModelRunner]]:
    """Makes the runner of an engine record its passes."""
    changed: list[DenoisingModelRunner] = []

    def get(model: str, max_batch_tokens: int = MAX_BATCH_TOKENS, max_tokens: int = 4096) -> Any:
        runner = runner_of(engine(model, max_batch_tokens))
        runner.record_passes(max_tokens, Rerun)
        changed.append(runner)
        return runner

    yield get
    for runner in changed:
        runner.graphs = None


@dataclass
class Metadata:
    """Of a backend that adds a number."""

    offset: torch.Tensor


def graphs_of(runner: DenoisingModelRunner) -> cuda_graphs.PassGraphs:
    assert runner.graphs is not None
    return runner.graphs


@pytest.mark.parametrize("model", MODELS)
def test_golden_cases_alone(
    engine: Callable[..., LLM], recording: Callable[..., DenoisingModelRunner], model: str
) -> None:
    runner = recording(model)
    for case in load_cases(model):
        before = graphs_of(runner).num_replays
        assert generate(engine(model), [case]) == [case.expected]
        assert graphs_of(runner).num_replays > before
    # Each again: now most passes find a graph that was recorded for another run.
    num_graphs = len(graphs_of(runner))
    for case in load_cases(model):
        assert generate(engine(model), [case]) == [case.expected]
    assert len(graphs_of(runner)) == num_graphs


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_golden_cases_in_one_batch(
    engine: Callable[..., LLM],
    recording: Callable[..., DenoisingModelRunner],
    model: str,
    order: int,
) -> None:
    runner = recording(model)
    cases = load_cases(model)
    random.Random(order).shuffle(cases)
    assert generate(engine(model), cases) == [case.expected for case in cases]
    assert graphs_of(runner).num_replays > 0


def test_a_graph_takes_the_rows_of_another_request(
    engine: Callable[..., LLM], recording: Callable[..., DenoisingModelRunner]
) -> None:
    """Sparse requests of one shape share a graph but not their rows of the pattern store."""
    case = max((c for c in load_cases("llada-mha") if c.block_mask), key=lambda c: len(c.expected))
    runner = recording("llada-mha")
    assert generate(engine("llada-mha"), [case]) == [case.expected]
    assert runner.store is not None
    # A step of another request gives the rows back. The next request then gets others, and what the
    # first one left would be wrong.
    generate(engine("llada-mha"), load_cases("llada-mha")[:1])
    num_graphs = len(graphs_of(runner))
    taken = runner.store.allocate(7)
    runner.store.indices.zero_()
    runner.store.counts.fill_(1)
    try:
        assert generate(engine("llada-mha"), [case]) == [case.expected]
    finally:
        runner.store.release(taken)
    assert len(graphs_of(runner)) == num_graphs > 0


@pytest.mark.parametrize("sparse", [0, 1], ids=["dense", "sparse"])
def test_guided_halves_in_turn(
    engine: Callable[..., LLM], recording: Callable[..., DenoisingModelRunner], sparse: int
) -> None:
    """Both passes of a step may use one graph, the second when the first one's result is used."""
    prompt, params = guided(330, sparse)
    tokens = []
    for record in (False, True):
        llm = engine("llada-mha", MAX_MODEL_LEN)
        if record:
            runner = recording("llada-mha", MAX_MODEL_LEN)
        output = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        tokens.append(list(output.outputs[0].token_ids))
    assert tokens[0] == tokens[1]
    assert graphs_of(runner).num_replays > 0


def test_long_passes_are_not_recorded(
    engine: Callable[..., LLM], recording: Callable[..., DenoisingModelRunner]
) -> None:
    case = load_cases("llada-mha")[0]
    runner = recording("llada-mha", max_tokens=len(case.prompt))
    assert generate(engine("llada-mha"), [case]) == [case.expected]
    assert len(graphs_of(runner)) == 0


def test_a_pass_that_cannot_be_recorded_runs_as_before(
    engine: Callable[..., LLM],
    recording: Callable[..., DenoisingModelRunner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(cuda_graphs.logger, "warning", lambda text, *args: warnings.append(text))

    def fail(run: Callable[[], torch.Tensor]) -> Rerun:
        raise RuntimeError("operation not permitted when stream is capturing")

    case = load_cases("llada-mha")[0]
    runner = recording("llada-mha")
    runner.record_passes(4096, fail)
    assert generate(engine("llada-mha"), [case]) == [case.expected]
    assert len(warnings) == 1
    assert graphs_of(runner).num_replays == 0


def test_short_of_memory_only_shorter_passes_are_recorded(
    engine: Callable[..., LLM],
    recording: Callable[..., DenoisingModelRunner],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second try follows, with what the allocator had kept; then the pass runs as before."""
    warnings: list[tuple[object, ...]] = []
    monkeypatch.setattr(cuda_graphs.logger, "warning", lambda text, *args: warnings.append(args))
    cases = sorted(load_cases("llada-mha"), key=lambda case: len(case.prompt))
    tried: list[int] = []

    def record(run: Callable[[], torch.Tensor]) -> Rerun:
        tried.append(len(run()))
        # The long one never fits, the short one the second time.
        if tried[-1:] != tried[-2:-1] or tried[-1] > len(cases[0].prompt) + len(cases[0].expected):
            raise torch.OutOfMemoryError
        return Rerun(run)

    runner = recording("llada-mha")
    runner.record_passes(4096, record)
    for case in (cases[-1], cases[0]):
        assert generate(engine("llada-mha"), [case]) == [case.expected]
    length, short = tried[0], tried[-1]
    assert tried == [length, length, short, short]
    assert warnings == [(length,)]
    assert graphs_of(runner).max_tokens == length - 1
    assert graphs_of(runner).num_replays > 0


def test_an_experiment_is_not_recorded(
    engine: Callable[..., LLM], recording: Callable[..., DenoisingModelRunner]
) -> None:
    runner = recording("llada-mha")
    layer = runner.model.model.layers[1].self_attn.attn
    impl_class = type(layer.impl)
    layer.impl.__class__ = type("Experiment", (impl_class,), {})
    try:
        generate(engine("llada-mha"), load_cases("llada-mha")[:1])
    finally:
        layer.impl.__class__ = impl_class
    assert len(graphs_of(runner)) == 0


def test_the_graph_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    token_ids = torch.arange(8, dtype=torch.int32)
    graphs = cuda_graphs.PassGraphs(
        lambda ids, positions, attention: ids + positions + attention["layer"].offset,
        [],
        token_ids,
        8,
        Rerun,
    )

    def batch(num_tokens: int, offset: int) -> Any:
        return PackedBatch(
            sequences=(),
            starts={},
            num_tokens=num_tokens,
            positions=torch.full((num_tokens,), 10),
            attention={"layer": Metadata(torch.tensor([offset]))},
        )

    batches = {n: batch(n, 100) for n in (1, 2, 3)}
    for n in (1, 2):
        assert [graphs.run(batches[n]) is None for _ in range(3)] == [True, True, False]
    assert graphs.run(batches[1]) is not None
    for _ in range(3):
        graphs.run(batches[3])
    assert len(graphs) == 2
    # 2 went: it is an ordinary pass again; 1 stayed, and serves another batch that looks like it.
    assert graphs.run(batch(2, 100)) is None
    assert graphs.run(batch(1, 200)).tolist() == [210]
    assert graphs.run(batches[1]).tolist() == [110]


def test_a_pass_that_builds_patterns_is_not_recorded() -> None:
    """What it writes differs from batch to batch, and it comes once."""

    @dataclass
    class Building(Metadata):
        builds: tuple[int, ...]

    graphs = cuda_graphs.PassGraphs(
        lambda ids, positions, attention: ids, [], torch.arange(8, dtype=torch.int32), 8, Rerun
    )
    for builds, recorded in (((1,), False), ((), True)):
        batch = PackedBatch(
            sequences=(),
            starts={},
            num_tokens=4,
            positions=torch.arange(4),
            attention={"layer": Building(torch.tensor([0]), builds)},
        )
        assert [graphs.run(batch) is not None for _ in range(4)][-1] == recorded
    assert len(graphs) == 1


def test_the_limit_comes_from_vllms_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CUDAGraphMode

    from vllm_sparsed.config import engine as engine_config

    def limit(ranks: int = 1, eager: bool = False, level: int = 2, **compilation: Any) -> int:
        options = {
            "cudagraph_mode": None,
            "cudagraph_capture_sizes": None,
            "max_cudagraph_capture_size": None,
        }
        return engine_config._graph_tokens(
            SimpleNamespace(
                compilation_config=SimpleNamespace(**(options | compilation)),
                model_config=SimpleNamespace(enforce_eager=eager),
                optimization_level=level,
                parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
            )
        )

    for cuda in (False, True):
        platform = SimpleNamespace(is_cuda=lambda cuda=cuda: cuda)
        monkeypatch.setattr(engine_config, "current_platform", platform)
        assert (limit() > 0) == cuda
    assert limit() == engine_config.GRAPH_TOKENS
    assert limit(max_cudagraph_capture_size=300) == 300
    assert limit(cudagraph_capture_sizes=[1, 64, 8]) == 64
    assert limit(eager=True) == limit(ranks=2) == limit(level=0) == 0
    assert limit(cudagraph_mode=CUDAGraphMode.NONE) == limit(max_cudagraph_capture_size=0) == 0


@pytest.mark.gpu
def test_after_a_failed_recording_memory_is_given_back_on_gpu() -> None:
    before = torch.ones(64, device="cuda")
    with pytest.raises(RuntimeError):
        cuda_graphs.CudaGraph(lambda: before * before.sum().item())
    torch.cuda.empty_cache()
    recorded = cuda_graphs.CudaGraph(lambda: before + before)
    assert recorded.replay().tolist() == [2.0] * 64


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_the_same_with_graphs_on_gpu(model: str, dtype: str) -> None:
    """Bit for bit, so also where rounding decides: golden requests, then requests that draw."""
    llm = start_golden(model, dtype=dtype)
    runner = runner_of(llm)
    recorded, cases = graphs_of(runner), load_cases(model)
    drawing = [
        SamplingParams(temperature=0.7, seed=seed, max_tokens=48, ignore_eos=True, detokenize=False)
        for seed in range(6)
    ]
    prompts = [{"prompt_token_ids": list(range(20, 40 + 9 * i))} for i in range(6)]
    found = []
    for graphs in (None, recorded):
        runner.graphs = graphs
        tokens = [generate(llm, [case])[0] for case in cases]
        outputs = llm.generate(prompts, drawing, use_tqdm=False)
        found.append(tokens + [list(output.outputs[0].token_ids) for output in outputs])
    assert found[0] == found[1]
    assert recorded.num_replays > 4 * len(cases)
    assert recorded.max_tokens > 0, "a pass could not be recorded"
    if dtype == "float32":
        assert found[0][: len(cases)] == [case.expected for case in cases]
    llm.llm_engine.engine_core.shutdown()
