"""Serving under load, and the engine's overhead a step.

    python -m benchmarks.serving.run                        LLaDA-8B's shape, 1, 4 and 16 clients
    python -m benchmarks.serving.run --url http://host:8000 --tokenizer FOLDER
    python -m benchmarks.serving.run --small                a tiny model, for a CPU
    python -m benchmarks.serving.run --measure load --input-len 8192 --clients 4 --resume \\
        --attention sparse dense

Starts `vllm serve` with random weights (or uses a running server), checks that the same request is
answered twice alike, and runs `vllm bench serve` with each number of clients; the time to first
token is the time to the first block, because tokens are sent when their block is decided. The
overhead is measured in a process of its own (`benchmarks.serving.overhead`). Prompts and canvases
are of mixed lengths, spread evenly around their means. Rows are written as soon as they are
measured; `--resume` keeps the rows of a folder and measures what they lack.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.denoising_engine import has_weights, model_path
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, has_row, reason
from benchmarks.serving import load as loads
from benchmarks.serving import overhead
from benchmarks.serving.checkpoint import with_tokenizer
from benchmarks.serving.load import Load
from benchmarks.serving.server import SERVED_NAME, model_name
from examples.local_server import ServerError, served

MEASURED: Final = ("overhead", "load")
USUAL: Final[dict[str, Any]] = {
    "model": "llada-8b",
    "dtype": "bfloat16",
    "clients": [1, 4, 16],
    "requests_per_client": 4,
    "input_len": 1024,
    "output_len": 128,
    "steps": 16,
    "block_size": 128,
    "batch_sizes": [1, 4, 16, 64],
    "overhead_steps": 32,
}
SMALL: Final[dict[str, Any]] = {
    "model": "tests/golden/llada-mha",
    "dtype": "float32",
    "clients": [2],
    "requests_per_client": 2,
    "input_len": 48,
    "output_len": 32,
    "steps": 8,
    "block_size": 16,
    "batch_sizes": [1, 4],
    "overhead_steps": 8,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, for a CPU")
    parser.add_argument("--measure", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--model", help="a folder of benchmarks/shapes, or a path")
    parser.add_argument("--url", help="a running server's address, without /v1")
    parser.add_argument("--tokenizer", help="of the running server's model")
    parser.add_argument("--backend", default="sparsed", help="sparsed, FLASH_ATTN, ...")
    parser.add_argument("--dtype")
    parser.add_argument("--quantization")
    parser.add_argument("--clients", type=int, nargs="+", help="requests under way at once")
    parser.add_argument("--requests-per-client", type=int)
    parser.add_argument("--input-len", type=int, help="mean tokens of a prompt")
    parser.add_argument("--output-len", type=int, help="mean tokens of a canvas")
    parser.add_argument("--range-ratio", type=float, default=0.5, help="spread of both")
    parser.add_argument("--steps", type=int, help="denoising steps of a request")
    parser.add_argument(
        "--attention", nargs="+", choices=loads.ATTENTION, default=["sparse"], help="of requests"
    )
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--select", type=float, default=0.3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="of the overhead")
    parser.add_argument("--overhead-steps", type=int)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--minutes", type=float, help="start nothing more after so many")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of one load")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSVs")
    parser.add_argument(
        "--resume", action="store_true", help="keep the folder's rows, measure what they lack"
    )
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.small else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.url and not options.tokenizer:
        parser.error("--url needs --tokenizer, the folder or name of the served model's tokenizer")
    if not 0 <= options.range_ratio < 1:
        parser.error(f"--range-ratio must be in [0, 1), got {options.range_ratio}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a part of it failed."""
    options = parse(arguments)
    deadline = Deadline(options.minutes)
    print(headline(), flush=True)
    failed = False
    if "overhead" in options.measure:
        failed |= measure_overhead(options, deadline)
    if "load" in options.measure:
        failed |= measure_loads(options, deadline)
    print(f"rows in {options.output}")
    return 1 if failed else 0


def measure_overhead(options: argparse.Namespace, deadline: Deadline) -> bool:
    """Run the overhead benchmark in a process of its own; whether it failed."""
    path = options.output / overhead.FILE
    if options.resume and all(has_row(path, "wall_ms", batch_size=n) for n in options.batch_sizes):
        print("overhead: all there", flush=True)
        return False
    command = [sys.executable, "-m", "benchmarks.serving.overhead", "--batch-sizes"]
    command += [*map(str, options.batch_sizes), "--steps", str(options.overhead_steps)]
    command += ["--output", str(options.output)]
    limit = min(options.time_limit, max(1.0, deadline.seconds_left))
    try:
        return subprocess.run(command, timeout=limit).returncode != 0
    except subprocess.TimeoutExpired:
        print(f"overhead: not done after {limit:.0f} s", flush=True)
        return True


def measure_loads(options: argparse.Namespace, deadline: Deadline) -> bool:
    """Run all loads against one server; whether anything failed."""
    file = RowFile(options.output / loads.FILE, loads.COLUMNS, append=options.resume)
    model = model_name(options.url) if options.url else options.model
    same = {"model": model, "backend": options.backend, "dtype": options.dtype}
    wanted = [
        load
        for load in all_loads(options)
        if not (options.resume and file.holds("seconds", **same, **loads.describe(load)))
    ]
    if not wanted:
        print("loads: all there", flush=True)
        return False
    try:
        if options.url:
            run = LoadRun(options, options.url, model, options.tokenizer, file, same, deadline)
            return run.run_all(wanted)
        with tempfile.TemporaryDirectory(prefix="vllm-sparsed-benchmark-") as folder:
            path = with_tokenizer(model_path(options.model), Path(folder) / "model")
            arguments = server_options(options, path, wanted)
            log = options.output / "server.log"
            with served(path, arguments, log, name=SERVED_NAME) as url:
                run = LoadRun(options, url, SERVED_NAME, str(path), file, same, deadline)
                return run.run_all(wanted)
    except (ServerError, OSError) as problem:
        print(problem, file=sys.stderr)
        file.add({**same, "note": reason(problem)})
        return True


def all_loads(options: argparse.Namespace) -> list[Load]:
    """One for each number of clients and kind of attention."""
    return [
        Load(
            clients,
            clients * options.requests_per_client,
            options.input_len,
            options.output_len,
            options.range_ratio,
            options.steps,
            attention,
        )
        for clients in options.clients
        for attention in options.attention
    ]


def server_options(options: argparse.Namespace, model: Path, all_loads: list[Load]) -> list[str]:
    """What `vllm serve` is started with, for the largest of the loads."""
    longest = max(load.longest for load in all_loads)
    most = max(load.clients for load in all_loads)
    sparsed = {
        "select": options.select,
        "block_size": options.block_size,
        "max_canvas": longest,
    }
    arguments = ["--attention-backend", options.backend, "--dtype", options.dtype]
    arguments += ["--max-model-len", str(longest), "--max-num-seqs", str(most)]
    arguments += ["--max-num-batched-tokens", str(longest * most)]
    arguments += ["--load-format", "auto" if has_weights(str(model)) else "dummy"]
    arguments += ["--additional-config", json.dumps({"sparsed": sparsed})]
    arguments += ["--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    if options.quantization:
        arguments += ["--quantization", options.quantization]
    return arguments


@dataclass(frozen=True)
class LoadRun:
    """Loads against one server, a row for each.

    Attributes:
        options: of the command.
        url: the server's address, without /v1.
        model: its name there.
        tokenizer: folder or name of its tokenizer.
        file: where rows go.
        same: what all rows have in common.
        deadline: after it no load is started.
    """

    options: argparse.Namespace
    url: str
    model: str
    tokenizer: str
    file: RowFile
    same: dict[str, Any]
    deadline: Deadline

    def run_all(self, wanted: Sequence[Load]) -> bool:
        """Run them in turn; whether any failed."""
        loads.check_answers(self.url, self.model, wanted[0])
        failed = False
        for load in wanted:
            failed |= self._run(load)
        return failed

    def _run(self, load: Load) -> bool:
        if self.deadline.passed:
            self.file.add({**self.same, **loads.describe(load), "note": self.deadline.note})
            print(f"{load.clients} clients: {self.deadline.note}", flush=True)
            return False
        limit = min(self.options.time_limit, self.deadline.seconds_left)
        try:
            result = loads.run_load(
                self.url, self.model, self.tokenizer, load, self.options.output, limit
            )
        except ServerError as problem:
            print(problem, file=sys.stderr)
            self.file.add({**self.same, **loads.describe(load), "note": reason(problem)})
            return True
        row = loads.row_of(load, result)
        self.file.add({**self.same, **row})
        print(
            f"{load.clients} clients, {load.attention}: {row['completed']} of {load.requests} "
            f"requests, {row['output_tokens_per_s']:.1f} output tokens/s, first block "
            f"{row['first_block_ms_p50']:.0f} ms, latency {row['latency_ms_p50']:.0f} ms (medians)",
            flush=True,
        )
        return bool(row["failed"])


if __name__ == "__main__":
    sys.exit(main())
