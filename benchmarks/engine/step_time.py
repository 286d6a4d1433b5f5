"""Times of denoising steps through vLLM at the shape of a real model, with dummy weights.

    python -m benchmarks.engine.step_time --model llada-8b --backend sparsed --lengths 4096 32768

One engine serves one request at a time. For each length it prints the median time of a dense step,
of the step that builds the patterns, of a sparse step and of the whole request, the peak memory,
with `--profile` where the time of a step goes (torch profiler, by kind of kernel), and with
`--floor` the time of the linear layers alone (`products_ms`, all rows of the canvas through the
head) and of reading their weights at the bandwidth of a copy (`read_ms`). `--output` appends the
same figures to step_time.csv in a folder.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.breakdown import StepProfiler, breakdown
from benchmarks.engine.denoising_engine import (
    EngineOptions,
    run_request,
    runner_of,
    start_engine,
)
from benchmarks.engine.floor import measure_floor
from benchmarks.measuring.rows import RowFile

FILE: Final = "step_time.csv"
COLUMNS: Final = (
    *("model", "backend", "dtype", "quantization", "length", "canvas", "steps", "request_s"),
    *("dense_step_ms", "pattern_step_ms", "first_sparse_ms", "sparse_step_ms", "graph_replays"),
    *("products_ms", "read_ms", "weights_gib", "copy_gbps", "peak_gib"),
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="llada-8b", help="a folder of benchmarks/shapes, or a path"
    )
    parser.add_argument("--backend", default="sparsed", help="sparsed, FLASH_ATTN, ...")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096], help="prompt + canvas")
    parser.add_argument("--canvas", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--skip", type=float, default=0.2)
    parser.add_argument("--select", type=float, default=0.3)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--max-steps", type=int, default=0, help="abort a request after so many")
    parser.add_argument("--profile", action="store_true", help="break steps down by kernel")
    parser.add_argument(
        "--floor", action="store_true", help="also time the products and a read of the weights"
    )
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--output", type=Path, help="folder of the CSV to append to")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse()
    options = EngineOptions(
        model=args.model,
        max_length=max(args.lengths),
        canvas=args.canvas,
        backend=args.backend,
        skip=args.skip,
        select=args.select,
        block_size=args.block_size,
        dtype=args.dtype,
        quantization=args.quantization,
        load_format=args.load_format,
        more={"gpu_memory_utilization": args.gpu_memory_utilization},
    )
    llm = start_engine(options)
    for length in args.lengths:
        measure(llm, args, length)


def measure(llm: Any, args: argparse.Namespace, length: int) -> None:
    """Run one request, and a second one under the profiler where that was asked for."""
    import torch
    from vllm import __version__ as vllm_version

    engine = llm.llm_engine
    cuda = torch.cuda.is_available()
    sparse = args.backend.lower() == "sparsed"
    pattern_step = int(args.steps * args.skip) + 1
    request = {
        "length": length,
        "canvas": min(args.canvas, length - 1),
        "steps": args.steps,
        "max_steps": args.max_steps,
    }
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = run_request(engine, **request).seconds
    row: dict[str, Any] = {
        "model": args.model,
        "backend": args.backend,
        "length": length,
        "canvas": request["canvas"],
        "dtype": args.dtype,
        "quantization": args.quantization,
        "steps": len(seconds),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "vllm": vllm_version,
        "torch": torch.__version__,
        "request_s": round(sum(seconds), 3),
    }
    dense = seconds[1:pattern_step] if sparse else seconds[1:]
    row["dense_step_ms"] = round(statistics.median(dense) * 1e3, 2) if dense else None
    if sparse and len(seconds) > pattern_step + 2:
        row["pattern_step_ms"] = round(seconds[pattern_step] * 1e3, 2)
        row["first_sparse_ms"] = round(seconds[pattern_step + 1] * 1e3, 2)
        row["sparse_step_ms"] = round(statistics.median(seconds[pattern_step + 2 :]) * 1e3, 2)
    graphs = runner_of(llm).graphs
    row["graph_replays"] = graphs.num_replays if graphs is not None else 0
    if args.floor:
        floor = measure_floor(runner_of(llm).model, length, request["canvas"])
        row |= {
            "products_ms": round(floor.products_ms, 3),
            "read_ms": round(floor.read_ms, 3),
            "weights_gib": round(floor.weights_gib, 2),
            "copy_gbps": round(floor.bandwidth_gbps),
        }
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(row), flush=True)
    if args.output:
        columns = {name: row.get(name) for name in COLUMNS}
        RowFile(args.output / FILE, COLUMNS, append=True).add(columns)
    if not args.profile:
        return
    wanted = {"dense": min(4, pattern_step - 1)}
    if "sparse_step_ms" in row:
        wanted["sparse"] = min(pattern_step + 4, len(seconds) - 1)
    profiler = StepProfiler(list(wanted.values()))
    seconds = run_request(engine, **request, on_step=profiler.on_step).seconds
    for name, step in wanted.items():
        kernels = profiler.kernels(step)
        if not kernels:
            continue
        # The same step's: from one run to the next a GPU's clock changes by some percent.
        wall_ms = seconds[step] * 1e3
        result = breakdown(kernels, wall_ms)
        shares = {k: f"{t:.2f} ms ({t / wall_ms:.1%})" for k, t in result.milliseconds.items()}
        print(f"{args.model} {args.backend} {length} {name} step: {shares}", flush=True)
        for milliseconds, count, key in result.longest:
            print(f"    {milliseconds:9.3f} ms  x{count:<5} {key[:90]}", flush=True)


if __name__ == "__main__":
    main()
