"""Whole requests at the shape of LLaDA-8B and Dream-7B: ours, and plain PyTorch loops.

    python -m benchmarks.requests.run                      all lengths of both models
    python -m benchmarks.requests.run --models llada-8b --lengths 65536 --measure ours
    python -m benchmarks.requests.run --small              tiny models, for a CPU

Weights are random. A few steps of each kind (dense; the last dense one, which also builds the
patterns; sparse) are measured after a check against a plain reference; the time of a request of T
steps is the medians times how often each kind comes, and every row says that it is extrapolated
and from how many steps. Ours is vLLM in this process: its dense steps stand for the same engine
without SparseD. Each model and kind of loop runs in a process of its own, so that one that fails or
does not fit leaves the others alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.engine.denoising_engine import (
    EngineOptions,
    draw_weights,
    has_weights,
    model_path,
    runner_of,
    start_engine,
    stop_engine,
)
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, reason
from benchmarks.reference.models import Dimensions, ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests import tables
from benchmarks.requests.plain_steps import Measurement, measure_plain
from benchmarks.requests.random_model import random_weights, read_config, served_weights
from benchmarks.requests.served_steps import check_served, measure_served
from benchmarks.requests.tables import RequestTables

MEASURED: Final = ("plain", "ours")
SMALL_MODELS: Final = ("tests/golden/llada-mha", "tests/golden/dream-gqa")
SMALL: Final = {
    "models": list(SMALL_MODELS),
    "lengths": [200],
    "canvas": 64,
    "block_size": 16,
    "dtype": "float32",
    "totals": [16, 64],
}
"""What --small sets unless it is given."""

USUAL: Final = {
    "models": ["llada-8b", "dream-7b"],
    "lengths": [4096, 16384, 32768, 65536],
    "canvas": 1024,
    "block_size": 128,
    "dtype": "bfloat16",
    "totals": [128, 1024],
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny models and lengths, for a CPU")
    parser.add_argument("--models", nargs="+", help="folders of benchmarks/shapes, or paths")
    parser.add_argument("--lengths", type=int, nargs="+", help="prompt and canvas, in tokens")
    parser.add_argument("--measure", nargs="+", choices=MEASURED, default=list(MEASURED))
    parser.add_argument("--canvas", type=int)
    parser.add_argument("--skip", type=float, default=0.2)
    parser.add_argument("--select", type=float, default=0.3)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--totals", type=int, nargs="+", help="T of the extrapolated requests")
    parser.add_argument("--dense-steps", type=int, default=2, help="to time, of each loop")
    parser.add_argument("--sparse-steps", type=int, default=2, help="to time, of each loop")
    parser.add_argument(
        "--pattern-layers",
        type=int,
        default=2,
        help="layers whose patterns the plain loop builds while it is timed; 0: all",
    )
    parser.add_argument("--no-profile", action="store_true", help="no breakdown of steps")
    parser.add_argument("--dtype")
    parser.add_argument("--quantization", help="of our engine's linear layers: fp8")
    parser.add_argument("--backend", default="sparsed", help="attention backend of our engine")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds of one process")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSVs")
    parser.add_argument("--append", action="store_true", help="keep the rows that are there")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.small else USUAL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.backend.lower() != "sparsed" and "ours" in options.measure:
        parser.error(
            "--backend must be sparsed, whose dense steps are the dense engine; "
            "benchmarks.engine.step_time times other backends"
        )
    if min(options.dense_steps, options.sparse_steps) < 1:
        parser.error("--dense-steps and --sparse-steps must be at least 1")
    if min(options.lengths) <= options.canvas:
        parser.error(f"--lengths must be above --canvas, {options.canvas}: there is no prompt")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a process failed."""
    options = parse(arguments)
    if options.in_this_process:
        measure_one(options)
        return 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    print(headline(), flush=True)
    RequestTables(options.output, options.append)
    failures = 0
    for model in options.models:
        for measured in options.measure:
            command = [sys.executable, "-m", "benchmarks.requests.run", *given, "--in-this-process"]
            command += ["--models", model, "--measure", measured]
            try:
                failures += subprocess.run(command, timeout=options.time_limit).returncode != 0
            except subprocess.TimeoutExpired:
                print(f"{model}, {measured}: not done after {options.time_limit:.0f} s", flush=True)
                failures += 1
    print(f"rows in {options.output}")
    return 1 if failures else 0


def measure_one(options: argparse.Namespace) -> None:
    """Measure one model's plain loops or our engine on all lengths, shortest first."""
    table = RequestTables(options.output, append=True)
    for model in options.models:
        for measured in options.measure:
            if measured == "plain":
                measure_plain_loops(options, model, table)
            else:
                measure_ours(options, model, table)


def measurements(options: argparse.Namespace) -> list[Measurement]:
    """One for each length, ascending."""
    settings = SparseSettings(options.skip, options.select, options.block_size)
    return [
        Measurement(
            length,
            options.canvas,
            settings,
            options.dense_steps,
            options.sparse_steps,
            options.pattern_layers,
        )
        for length in sorted(options.lengths)
    ]


def measure_plain_loops(options: argparse.Namespace, model: str, table: RequestTables) -> None:
    """Dense and sparse plain loops of one model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_config(model_path(model))
    weights = random_weights(config, getattr(torch, options.dtype), device)
    for what in measurements(options):
        for provider, sparse in ((tables.PLAIN_DENSE, False), (tables.PLAIN_SPARSE, True)):
            request = tables.describe(model, provider, options.dtype, None, what)
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                times = measure_plain(config, weights, what, sparse)
            except Exception as problem:
                table.failed(request, reason(problem))
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            table.add(request, times, what, options.totals, sparse, peak)


def measure_ours(options: argparse.Namespace, model: str, table: RequestTables) -> None:
    """Our engine, dense and sparse steps of one request."""
    engine = EngineOptions(
        model=model,
        max_length=max(options.lengths),
        canvas=options.canvas,
        backend=options.backend,
        skip=options.skip,
        select=options.select,
        block_size=options.block_size,
        dtype=options.dtype,
        quantization=options.quantization,
        load_format="auto" if has_weights(model) else "dummy",
        more={"gpu_memory_utilization": options.gpu_memory_utilization},
    )
    llm = start_engine(engine)
    try:
        print(f"{model}: {check(llm, options, model)}", flush=True)
        for what in measurements(options):
            providers = ((tables.OURS_DENSE, False), (tables.OURS_SPARSE, True))
            requests = [
                tables.describe(model, provider, options.dtype, options.quantization, what)
                for provider, _ in providers
            ]
            try:
                result = measure_served(llm, what, not options.no_profile)
            except Exception as problem:
                table.failed(requests[1], reason(problem))
                continue
            for request, (_, sparse) in zip(requests, providers, strict=True):
                table.add(request, result.times, what, options.totals, sparse, result.peak_gib)
            table.add_breakdown(requests[1], result)
    finally:
        stop_engine(llm)


def check(llm: Any, options: argparse.Namespace, model: str) -> str:
    """Compare the engine's logits with the plain reference; says how far they are apart."""
    config, runner = read_config(model_path(model)), runner_of(llm)
    dtype = runner.model_config.dtype
    if options.quantization:
        return "quantized weights, logits not compared"
    if has_weights(model):
        reference = ReferenceModel.load(model_path(model), dtype, runner.device)
    elif draw_weights(runner.model):
        weights = served_weights(runner.model, config)
        reference = ReferenceModel(Dimensions.from_config(config), weights)
    else:
        return "vLLM has repacked its weights, logits not compared"
    return f"relative error of the served logits {check_served(llm, config, reference):.1e}"


if __name__ == "__main__":
    sys.exit(main())
