"""Chat requests that arrive beside long ones: latency of each kind alone and mixed, throughput.

    python -m benchmarks.serving.mixed                      LLaDA-8B's shape, 1k beside 32k
    python -m benchmarks.serving.mixed --small              a tiny model, for a CPU
    python -m benchmarks.serving.mixed --checkout FOLDER    the same with another checkout's package

Starts `vllm serve` with random weights and the usual budget of tokens, as many as the context, (or
uses a running server) and lets clients of each kind ask one request after the other: chat alone,
long alone, and the same requests of both kinds at once, where the chat clients start when the long
ones have been running for a while. `throughput` of the mix is all its output tokens over the time
until the last request ends; with `--checkout` and the same `--output` and `--resume` both stand in
one table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.denoising_engine import has_weights, model_path
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.serving.checkpoint import with_tokenizer
from benchmarks.serving.server import SERVED_NAME, ServerError, complete, model_name, served

FILE: Final = "mixed_lengths.csv"
PERCENTILES: Final = (50, 90, 99)
COLUMNS: Final = (
    *("model", "dtype", "checkout", "phase", "kind", "clients", "requests", "failed"),
    *("prompt_len", "canvas", "steps", "seconds", "output_tokens_per_s"),
    *(f"latency_ms_p{p}" for p in PERCENTILES),
    "note",
)


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind and those who ask for them.

    Attributes:
        clients: requests under way at once.
        requests: of each client.
        prompt_len, canvas, steps: of a request.
    """

    name: str
    clients: int
    requests: int
    prompt_len: int
    canvas: int
    steps: int

    @property
    def num_tokens(self) -> int:
        """Tokens of a request's sequence."""
        return self.prompt_len + self.canvas

    def body(self, model: str, seed: int) -> dict[str, Any]:
        """A request, of whose prompt the seed is part."""
        return {
            "model": model,
            "prompt": [10 + (seed + i) % 90 for i in range(self.prompt_len)],
            "max_tokens": self.canvas,
            "temperature": 0.0,
            "ignore_eos": True,
            "vllm_xargs": {"diffusion_steps": self.steps, "diffusion_block_length": self.canvas},
        }


USUAL: Final[dict[str, Any]] = {
    "model": "llada-8b",
    "dtype": "bfloat16",
    "chat": (1, 16, 1024, 128, 32),
    "long": (1, 1, 32_640, 128, 64),
    "delay": 3.0,
}
SMALL: Final[dict[str, Any]] = {
    "model": "tests/golden/llada-mha",
    "dtype": "float32",
    "chat": (2, 3, 24, 8, 8),
    "long": (1, 1, 600, 32, 32),
    "delay": 0.2,
}


@dataclass(slots=True)
class Measured:
    """Latencies in seconds of the requests of one kind, and how many failed."""

    latencies: list[float]
    failed: int = 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--model", help="a folder of benchmarks/shapes, or a path")
    parser.add_argument("--url", help="a running server's address, without /v1")
    parser.add_argument("--checkout", type=Path, help="folder whose package the server runs")
    parser.add_argument("--dtype")
    parser.add_argument("--backend", default="sparsed")
    form = ("CLIENTS", "REQUESTS", "PROMPT", "CANVAS", "STEPS")
    for kind in ("chat", "long"):
        parser.add_argument(
            f"--{kind}", type=int, nargs=5, metavar=form, help="requests per client"
        )
    parser.add_argument("--budget", type=int, help="tokens of a step; default: the context")
    parser.add_argument("--delay", type=float, help="seconds by which long requests are ahead")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.small else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.url and options.checkout:
        parser.error("--checkout is for a server that is started here, --url for one that runs")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a part of it failed."""
    options = parse(arguments)
    print(headline(), flush=True)
    file = RowFile(options.output / FILE, COLUMNS, append=options.resume)
    kinds = [Kind(name, *getattr(options, name)) for name in ("chat", "long")]
    same = {
        "model": model_name(options.url) if options.url else options.model,
        "dtype": options.dtype,
        "checkout": options.checkout.name if options.checkout else "this",
    }
    try:
        if options.url:
            failed = run(options.url, str(same["model"]), kinds, options.delay, file, same)
        else:
            with tempfile.TemporaryDirectory(prefix="vllm-sparsed-benchmark-") as folder:
                path = with_tokenizer(model_path(options.model), Path(folder) / "model")
                environment = (
                    {"PYTHONPATH": str(options.checkout.resolve())} if options.checkout else {}
                )
                arguments = server_options(options, path, kinds)
                log = options.output / "mixed_server.log"
                with served(path, arguments, log, environment) as url:
                    failed = run(url, SERVED_NAME, kinds, options.delay, file, same)
    except (ServerError, OSError) as problem:
        print(problem, file=sys.stderr)
        file.add({**same, "note": reason(problem)})
        return 1
    print(f"rows in {file.path}")
    return 1 if failed else 0


def server_options(options: argparse.Namespace, model: Path, kinds: Sequence[Kind]) -> list[str]:
    """What `vllm serve` is started with: the context of the longest kind, and a budget of it."""
    context = max(kind.num_tokens for kind in kinds)
    arguments = ["--attention-backend", options.backend, "--dtype", options.dtype]
    arguments += ["--max-model-len", str(context)]
    arguments += ["--max-num-batched-tokens", str(options.budget or context)]
    arguments += ["--load-format", "auto" if has_weights(str(model)) else "dummy"]
    arguments += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    return arguments


def run(
    url: str,
    model: str,
    kinds: Sequence[Kind],
    delay: float,
    file: RowFile,
    same: dict[str, Any],
) -> bool:
    """Measure all phases; whether a request failed."""

    def ask(kind: Kind, seed: int) -> bool:
        answer = complete(url, kind.body(model, seed))
        return bool(answer["usage"]["completion_tokens"] == kind.canvas)

    for kind in kinds:
        ask(kind, 0)  # what is compiled or recorded for the first request
    failed = False
    phases: list[tuple[str, list[Kind]]] = [("alone", [kind]) for kind in kinds]
    for phase, asked in [*phases, ("mixed", list(kinds))]:
        seconds, measured = run_phase(asked, ask, delay)
        for row in rows_of(phase, asked, seconds, measured):
            file.add({**same, **row})
            failed |= bool(row["failed"])
            print(
                f"{phase}, {row['kind']}: {row['requests']} requests, {row['failed']} failed, "
                f"latency {row['latency_ms_p50']:.0f} ms (median), "
                f"{row['output_tokens_per_s']:.1f} output tokens/s of all",
                flush=True,
            )
    return failed


def run_phase(
    kinds: Sequence[Kind], ask: Callable[[Kind, int], bool], delay: float
) -> tuple[float, list[Measured]]:
    """Let all clients ask one request after the other, those of the last kind first.

    Args:
        ask: sends a request and waits for its answer; whether that is complete.
        delay: seconds by which the last kind is ahead of the others.

    Returns:
        Seconds until the last request ended, and what was measured of each kind.
    """
    measured = [Measured([]) for _ in kinds]
    lock = threading.Lock()

    def client(index: int, number: int) -> None:
        kind = kinds[index]
        for request in range(kind.requests):
            start = time.perf_counter()
            try:
                complete_answer = ask(kind, 7 * number + request)
            except OSError:
                complete_answer = False
            seconds = time.perf_counter() - start
            with lock:
                if complete_answer:
                    measured[index].latencies.append(seconds)
                else:
                    measured[index].failed += 1

    start = time.perf_counter()
    threads: list[threading.Thread] = []
    for index in reversed(range(len(kinds))):
        for number in range(kinds[index].clients):
            threads.append(threading.Thread(target=client, args=(index, number)))
            threads[-1].start()
        if index:
            time.sleep(delay)
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, measured


def rows_of(
    phase: str, kinds: Sequence[Kind], seconds: float, measured: Sequence[Measured]
) -> list[dict[str, Any]]:
    """A row for each kind of a phase."""
    tokens = sum(
        len(of_kind.latencies) * kind.canvas for kind, of_kind in zip(kinds, measured, strict=True)
    )
    return [
        {
            "phase": phase,
            "kind": kind.name,
            "clients": kind.clients,
            "requests": kind.clients * kind.requests,
            "failed": of_kind.failed,
            "prompt_len": kind.prompt_len,
            "canvas": kind.canvas,
            "steps": kind.steps,
            "seconds": seconds,
            "output_tokens_per_s": tokens / seconds,
            **{f"latency_ms_p{p}": 1e3 * percentile(of_kind.latencies, p) for p in PERCENTILES},
        }
        for kind, of_kind in zip(kinds, measured, strict=True)
    ]


def percentile(values: Sequence[float], percent: int) -> float:
    """Of no values: not a number."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


if __name__ == "__main__":
    sys.exit(main())
