"""Requests that keep keys and values between passes, at the shape of a real model, dummy weights.

    python -m benchmarks.engine.reuse_time --model llada-8b --length 65536 --canvas 1024 \\
        --refresh-tokens 128
    python -m benchmarks.engine.reuse_time --model llada-8b --length 1280 --canvas 256 \\
        --tokens-per-pass 3 --clients 1 16
    python -m benchmarks.engine.reuse_time --small

One engine serves so many clients at once, each with one request. With random weights no pace means
anything: k tokens a pass are a schedule of canvas / k steps. For each number of clients it prints
the time of the whole requests, tokens per second, and the median time and number of engine steps of
each kind: window passes alone, passes over whole sequences alone, and both together. The same
engine then runs the same requests with `none`, so many steps of them as are asked for, and the time
of all their steps follows from the medians of dense and sparse ones. `--output` appends the figures
to reuse_time.csv in a folder; `--profile` says where the time of a window pass goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.breakdown import StepProfiler, breakdown
from benchmarks.engine.denoising_engine import (
    EngineOptions,
    OnStep,
    no_context,
    random_prompt,
    runner_of,
    start_engine,
)
from benchmarks.measuring.rows import RowFile

FILE: Final = "reuse_time.csv"
WHOLE_WARM_UP: Final = 8192
"""Tokens of the longest requests that are run once before they are timed."""

BATCH_TOKENS: Final = 16384

KINDS: Final = ("window", "whole", "mixed")
COLUMNS: Final = (
    *("model", "dtype", "quantization", "kv_cache_dtype", "length", "canvas", "block_length"),
    *("steps", "mode", "refresh_tokens", "margin", "sparse", "clients", "seconds"),
    *("tokens_per_s", *(f"{kind}_ms" for kind in KINDS), *(f"{kind}_steps" for kind in KINDS)),
    *("graph_replays", "none_dense_ms", "none_sparse_ms", "none_seconds", "peak_gib"),
)
SMALL: Final = {
    "model": "tests/golden/llada-mha",
    "length": 320,
    "canvas": 64,
    "block_size": 16,
    "dtype": "float32",
    "clients": [1, 2],
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--small", action="store_true", help="a tiny model, for a CPU")
    add("--model", default="llada-8b", help="a folder of benchmarks/shapes, or a path")
    add("--length", type=int, default=65536, help="prompt + canvas")
    add("--canvas", type=int, default=1024)
    add("--block-length", type=int, default=32)
    add("--tokens-per-pass", type=float, default=1.0)
    add("--mode", default="window", choices=("window", "dual", "prefix"))
    add("--refresh-tokens", type=int, help="default: the block length")
    add("--margin", type=int, default=16)
    add("--clients", type=int, nargs="+", default=[1])
    add("--dense", action="store_true", help="no SparseD")
    add("--skip", type=float, default=0.2)
    add("--select", type=float, default=0.3)
    add("--block-size", type=int, default=128)
    add("--alg", default=None, help="diffusion_alg; default: the model's")
    add(
        "--warm-up-steps",
        type=int,
        help="engine steps before those that count, which record CUDA graphs; default: a whole run "
        f"up to {WHOLE_WARM_UP:,} tokens, else 12",
    )
    add("--none-steps", type=int, default=8, help="steps of `none` to time; 0: none")
    add(
        "--batch-tokens",
        type=int,
        help="budget of an engine step, which the pattern store is sized for too; default: all "
        f"requests, up to {BATCH_TOKENS:,} tokens, or one",
    )
    add("--dtype", default="bfloat16")
    add("--kv-cache-dtype", default="auto")
    add("--quantization", default=None)
    add("--load-format", default="dummy")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--profile", action="store_true", help="break a window pass down by kernel")
    add("--output", type=Path, help="folder of the CSV to append to")
    options = parser.parse_args(arguments)
    if options.small:
        vars(options).update(SMALL)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    more: dict[str, Any] = {
        "max_num_seqs": max(options.clients),
        "max_num_batched_tokens": options.batch_tokens
        or max(options.length, min(BATCH_TOKENS, max(options.clients) * options.length)),
        "kv_cache_dtype": options.kv_cache_dtype,
        "gpu_memory_utilization": options.gpu_memory_utilization,
    }
    if options.small:
        more["hf_overrides"] = {}
    llm = start_engine(
        EngineOptions(
            model=options.model,
            max_length=options.length,
            canvas=options.canvas,
            skip=options.skip,
            select=options.select,
            block_size=options.block_size,
            dtype=options.dtype,
            quantization=options.quantization,
            load_format=options.load_format,
            more=more,
        )
    )
    for clients in options.clients:
        measure(llm, options, clients)


def measure(llm: Any, options: argparse.Namespace, clients: int) -> None:
    """Run so many requests at once, with kept keys and values and without."""
    import torch

    cuda = torch.cuda.is_available()
    warm_up = options.warm_up_steps
    if warm_up is None:
        warm_up = 0 if options.length <= WHOLE_WARM_UP else 12
    run_clients(llm, options, clients, options.mode, max_steps=warm_up)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    graphs = runner_of(llm).graphs
    replays = graphs.num_replays if graphs is not None else 0
    steps = run_clients(llm, options, clients, options.mode)
    row = summary(options, clients, steps)
    row["graph_replays"] = graphs.num_replays - replays if graphs is not None else 0
    if options.none_steps:
        row |= time_of_none(llm, options, clients)
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(row), flush=True)
    if options.output:
        RowFile(options.output / FILE, COLUMNS, append=True).add(row)
    windows = [i for i, (kind, _) in enumerate(steps) if kind == "window"]
    if options.profile and windows:
        chosen = windows[len(windows) // 2]
        profiler = StepProfiler([chosen])
        again = run_clients(llm, options, clients, options.mode, on_step=profiler.on_step)
        kernels = profiler.kernels(chosen)
        if kernels:
            result = breakdown(kernels, again[chosen][1] * 1e3)
            print({k: f"{t:.2f} ms" for k, t in result.milliseconds.items()}, flush=True)
            for milliseconds, count, key in result.longest:
                print(f"    {milliseconds:9.3f} ms  x{count:<5} {key[:90]}", flush=True)


def summary(
    options: argparse.Namespace, clients: int, steps: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """The figures of a run's engine steps, each its kind and seconds."""
    seconds = sum(took for _, took in steps)
    row: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "kv_cache_dtype": options.kv_cache_dtype,
        "length": options.length,
        "canvas": options.canvas,
        "block_length": options.block_length,
        "steps": schedule_steps(options),
        "mode": options.mode,
        "refresh_tokens": options.refresh_tokens or options.block_length,
        "margin": options.margin,
        "sparse": not options.dense,
        "clients": clients,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(clients * options.canvas / seconds, 1),
    }
    by_kind: defaultdict[str, list[float]] = defaultdict(list)
    for kind, took in steps:
        by_kind[kind].append(took)
    for kind in KINDS:
        row[f"{kind}_steps"] = len(by_kind[kind])
        row[f"{kind}_ms"] = (
            round(statistics.median(by_kind[kind]) * 1e3, 3) if by_kind[kind] else None
        )
    return row


def time_of_none(llm: Any, options: argparse.Namespace, clients: int) -> dict[str, Any]:
    """What the same requests take with `none`, from a few of their steps.

    Sparse steps are timed in requests that build their patterns in the second step.
    """
    count = options.none_steps
    dense = run_clients(llm, options, clients, "none", max_steps=count, skip=0.99)
    dense_ms = statistics.median(took for _, took in dense[1:]) * 1e3
    total = schedule_steps(options)
    row = {"none_dense_ms": round(dense_ms, 3)}
    if options.dense:
        return row | {"none_seconds": round(total * dense_ms / 1e3, 2)}
    sparse = run_clients(llm, options, clients, "none", max_steps=count + 2, skip=0.0)
    sparse_ms = statistics.median(took for _, took in sparse[3:]) * 1e3
    dense_steps = int(total * options.skip) + 2
    seconds = (dense_steps * dense_ms + (total - dense_steps) * sparse_ms) / 1e3
    return row | {"none_sparse_ms": round(sparse_ms, 3), "none_seconds": round(seconds, 2)}


def schedule_steps(options: argparse.Namespace) -> int:
    """Denoising steps of a request."""
    return max(1, round(options.canvas / options.tokens_per_pass))


def run_clients(
    llm: Any,
    options: argparse.Namespace,
    clients: int,
    mode: str,
    *,
    max_steps: int = 0,
    skip: float | None = None,
    on_step: OnStep = no_context,
) -> list[tuple[str, float]]:
    """Run so many requests at once, or some engine steps of them.

    Returns:
        Of each engine step its kind and its seconds.
    """
    from vllm import SamplingParams

    engine, runner = llm.llm_engine, runner_of(llm)
    args: dict[str, Any] = {
        "diffusion_steps": schedule_steps(options),
        "diffusion_block_length": options.block_length,
        "diffusion_kv_reuse": mode,
        "sparsed_enabled": not options.dense,
        "sparsed_skip": options.skip if skip is None else skip,
    }
    if options.alg is not None:
        args["diffusion_alg"] = options.alg
    if mode == "window":
        args["diffusion_window_margin"] = options.margin
        if options.refresh_tokens is not None:
            args["diffusion_refresh_tokens"] = options.refresh_tokens
    params = SamplingParams(
        temperature=0.0,
        max_tokens=options.canvas,
        ignore_eos=True,
        detokenize=False,
        extra_args=args,
    )
    vocab_size = engine.vllm_config.model_config.get_vocab_size()
    started_at = time.time()
    for client in range(clients):
        prompt = random_prompt(options.length - options.canvas, vocab_size, seed=client)
        engine.add_request(f"{started_at}-{client}", {"prompt_token_ids": prompt}, params)
    request_ids = list(engine.output_processor.request_states)
    kinds: list[str] = []
    run_pass = runner.run_pass

    def watch(batch: Any) -> Any:
        metadata = next(iter(batch.attention.values()))
        kind = "mixed" if metadata.windows and metadata.num_whole else "whole"
        kinds.append("window" if metadata.windows and not metadata.num_whole else kind)
        return run_pass(batch)

    runner.run_pass = watch
    steps: list[tuple[str, float]] = []
    try:
        while engine.has_unfinished_requests() and not (max_steps and len(steps) >= max_steps):
            kinds.clear()
            with on_step(len(steps)):
                started = time.perf_counter()
                engine.step()
                seconds = time.perf_counter() - started
            steps.append((kinds[0] if kinds else "none", seconds))
    finally:
        del runner.run_pass
        if engine.has_unfinished_requests():
            engine.abort_request(request_ids, internal=True)
            engine.step()
    return steps


if __name__ == "__main__":
    main()
