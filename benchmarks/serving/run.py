"""Serving under load, and the engine's overhead a step.

    python -m benchmarks.serving.run                        LLaDA-8B's shape, 1, 4 and 16 clients
    python -m benchmarks.serving.run --url http://host:8000 --tokenizer FOLDER
    python -m benchmarks.serving.run --small                a tiny model, for a CPU

Starts `vllm serve` with random weights (or uses a running server), checks that the same request is
answered twice alike, and runs `vllm bench serve` with each number of clients; the time to first
token is the time to the first block, because tokens are sent when their block is decided. The
overhead is measured in a process of its own (`benchmarks.serving.overhead`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.denoising_engine import has_weights, model_path
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile, reason
from benchmarks.serving import load as loads
from benchmarks.serving.checkpoint import with_tokenizer
from benchmarks.serving.load import Load
from benchmarks.serving.server import SERVED_NAME, ServerError, model_name, served

MEASURED: Final = ("overhead", "load")
USUAL: Final[dict[str, Any]] = {
    "model": "llada-8b",
    "dtype": "bfloat16",
    "clients": [1, 4, 16],
    "requests_per_client": 4,
    "input_len": 1024,
    "output_len": 128,
    "steps": 32,
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
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--select", type=float, default=0.3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="of the overhead")
    parser.add_argument("--overhead-steps", type=int)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds of one load")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSVs")
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
    print(headline(), flush=True)
    failed = False
    if "overhead" in options.measure:
        failed |= measure_overhead(options)
    if "load" in options.measure:
        failed |= measure_loads(options)
    print(f"rows in {options.output}")
    return 1 if failed else 0


def measure_overhead(options: argparse.Namespace) -> bool:
    """Run the overhead benchmark in a process of its own; whether it failed."""
    command = [sys.executable, "-m", "benchmarks.serving.overhead", "--batch-sizes"]
    command += [*map(str, options.batch_sizes), "--steps", str(options.overhead_steps)]
    command += ["--output", str(options.output)]
    try:
        return subprocess.run(command, timeout=options.time_limit).returncode != 0
    except subprocess.TimeoutExpired:
        print(f"overhead: not done after {options.time_limit:.0f} s", flush=True)
        return True


def measure_loads(options: argparse.Namespace) -> bool:
    """Run all loads against one server; whether anything failed."""
    all_loads = [
        Load(
            clients,
            clients * options.requests_per_client,
            options.input_len,
            options.output_len,
            options.range_ratio,
            options.steps,
        )
        for clients in options.clients
    ]
    file = RowFile(options.output / loads.FILE, loads.COLUMNS)
    same = {"model": options.model, "backend": options.backend, "dtype": options.dtype}
    try:
        if options.url:
            name = model_name(options.url)
            same["model"] = name
            return _measure(options, options.url, name, options.tokenizer, all_loads, file, same)
        with tempfile.TemporaryDirectory(prefix="vllm-sparsed-benchmark-") as folder:
            model = with_tokenizer(model_path(options.model), Path(folder) / "model")
            log = options.output / "server.log"
            arguments = server_options(options, model, all_loads)
            with served(model, arguments, log) as url:
                return _measure(options, url, SERVED_NAME, str(model), all_loads, file, same)
    except (ServerError, OSError) as problem:
        print(problem, file=sys.stderr)
        file.add({**same, "note": reason(problem)})
        return True


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
    if options.quantization:
        arguments += ["--quantization", options.quantization]
    return arguments


def _measure(
    options: argparse.Namespace,
    url: str,
    model: str,
    tokenizer: str,
    all_loads: list[Load],
    file: RowFile,
    same: dict[str, Any],
) -> bool:
    loads.check_answers(url, model, all_loads[0])
    failed = False
    for load in all_loads:
        try:
            result = loads.run_load(url, model, tokenizer, load, options.output, options.time_limit)
        except ServerError as problem:
            print(problem, file=sys.stderr)
            file.add({**same, **loads.describe(load), "note": reason(problem)})
            failed = True
            continue
        row = loads.row_of(load, result)
        file.add({**same, **row})
        failed |= bool(row["failed"])
        print(
            f"{load.clients} clients: {row['completed']} of {load.requests} requests, "
            f"{row['output_tokens_per_s']:.1f} output tokens/s, first block "
            f"{row['first_block_ms_p50']:.0f} ms, latency {row['latency_ms_p50']:.0f} ms (medians)",
            flush=True,
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
