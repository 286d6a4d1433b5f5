"""The serving benchmark without a server: arguments, results, the clock of an engine step."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.serving import load as loads
from benchmarks.serving import run
from benchmarks.serving.checkpoint import with_tokenizer
from benchmarks.serving.load import Load, bench_arguments, check_answers, row_of
from benchmarks.serving.overhead import PARTS, StepClock
from examples.local_server import ServerError

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LOAD = Load(clients=4, requests=16, input_len=100, output_len=32, range_ratio=0.5, steps=8)


def test_a_tokenizer_that_gives_back_its_words(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = with_tokenizer(GOLDEN / "llada-mha", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = [7, 380, 12, 100]
    assert tokenizer.decode(tokens) == "w7 w380 w12 w100"
    assert tokenizer.encode("w7 w380 w12 w100", add_special_tokens=False) == tokens
    assert {tokenizer.mask_token_id, tokenizer.eos_token_id} == {383, 2}
    longest_word = max(len(f"w{token} ") for token in range(tokenizer.vocab_size))
    assert max(map(len, tokenizer.get_vocab())) > longest_word, "vLLM's bound on a text's length"
    assert (folder / "model.safetensors").is_file()
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert with_tokenizer(folder, tmp_path / "other") == folder


def test_the_load_reaches_vllm() -> None:
    arguments = bench_arguments("http://host:1", "name", "folder", LOAD)
    assert arguments[:2] == ["bench", "serve"]
    options = dict(zip(arguments[2:-2:2], arguments[3:-2:2], strict=True))
    assert options["--max-concurrency"] == "4"
    assert options["--num-prompts"] == "16"
    assert options["--random-range-ratio"] == "0.5"
    assert json.loads(options["--extra-body"]) == {"vllm_xargs": {"diffusion_steps": 8}}


def test_vllm_knows_the_arguments() -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(bench_arguments("http://host:1", "name", "folder", LOAD)[2:])
    assert (parsed.max_concurrency, parsed.random_input_len) == (4, 100)
    assert parsed.extra_body == {"vllm_xargs": {"diffusion_steps": 8}}


def test_a_row_from_a_result() -> None:
    result: dict[str, Any] = {
        "completed": 15,
        "failed": 1,
        "duration": 2.0,
        "request_throughput": 7.5,
        "output_throughput": 240.0,
        "total_token_throughput": 990.0,
    }
    for p in loads.PERCENTILES:
        result |= {f"p{p}_ttft_ms": 10.0 + p, f"p{p}_e2el_ms": 100.0 + p}
    row = row_of(LOAD, result)
    assert row["first_block_ms_p50"] == 60.0 and row["latency_ms_p99"] == 199.0
    assert (row["clients"], row["failed"], row["output_tokens_per_s"]) == (4, 1, 240.0)
    assert set(row) <= set(loads.COLUMNS)


def test_the_server_has_room_for_the_largest_load() -> None:
    options = run.parse(["--clients", "1", "16", "--input-len", "1000", "--output-len", "200"])
    largest = Load(16, 64, 1000, 200, 0.5, 32)
    arguments = run.server_options(options, GOLDEN / "llada-mha", [LOAD, largest])
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert int(given["--max-model-len"]) >= 1500 + 300
    assert int(given["--max-num-batched-tokens"]) >= 16 * 1800
    assert given["--load-format"] == "auto"
    assert json.loads(given["--additional-config"])["sparsed"]["block_size"] == 128


@pytest.mark.parametrize(
    ("texts", "tokens", "problem"),
    [
        (("a", "a"), (32, 32), None),
        (("a", "b"), (32, 32), "answered differently"),
        (("a", "a"), (32, 31), "32 tokens asked for"),
    ],
)
def test_answers_are_checked(
    texts: tuple[str, str],
    tokens: tuple[int, int],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = iter(
        {"choices": [{"text": text}], "usage": {"completion_tokens": count}}
        for text, count in zip(texts, tokens, strict=True)
    )
    monkeypatch.setattr(loads, "complete", lambda address, body: next(answers))
    if problem is None:
        check_answers("http://host", "name", LOAD)
        return
    with pytest.raises(ServerError, match=problem):
        check_answers("http://host", "name", LOAD)


def test_a_running_server_needs_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.parse(["--url", "http://host:1"])
    assert "--tokenizer" in capsys.readouterr().err


class FakeEngine:
    """An engine whose parts take known times, as the real one nests them."""

    def __init__(self) -> None:
        self.scheduler = SimpleNamespace(schedule=lambda: time.sleep(0.010))
        self.runner = SimpleNamespace(
            run_pass=lambda: time.sleep(0.030),
            decoder=SimpleNamespace(decode=lambda: time.sleep(0.020)),
            execute_model=self._execute,
        )
        worker = SimpleNamespace(model_runner=self.runner)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(worker=worker))
        core = SimpleNamespace(scheduler=self.scheduler, model_executor=executor)
        self.llm_engine = SimpleNamespace(
            engine_core=SimpleNamespace(engine_core=core), step=self._step
        )

    def _execute(self) -> None:
        time.sleep(0.015)
        self.runner.run_pass()
        self.runner.decoder.decode()

    def _step(self) -> None:
        self.scheduler.schedule()
        self.runner.execute_model()
        time.sleep(0.025)


def test_the_clock_tells_the_parts_apart() -> None:
    """Lower bounds alone: nothing can sleep too short, whatever else the machine does."""
    fake = FakeEngine()
    with StepClock(fake, "cpu") as clock:
        step = clock.step(fake.llm_engine)
    assert tuple(step) == ("scheduler", "runner", "output", "model", "sampler")
    assert set(step) == set(PARTS)
    least = dict(scheduler=0.010, runner=0.015, output=0.025, model=0.030, sampler=0.020)
    for part, seconds in least.items():
        assert step[part] >= seconds - 1e-4, part
