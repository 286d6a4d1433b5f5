"""Times of denoising steps through vLLM at the shape of a real model, with dummy weights.

    python benchmarks/engine/step_time.py --model llada-8b --backend sparsed --lengths 4096 32768

One engine serves one request at a time. For each length it prints the median time of a dense step,
of the step that builds the patterns, of a sparse step and of the whole request, the peak memory,
and where the time of a step goes (torch profiler, by kind of kernel).
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).resolve().parents[1] / "shapes"

KINDS = {
    "attention": ("flash", "block_sparse", "fmha", "sdpa"),
    "pattern": ("importance", "selection", "select", "lse"),
    "linear": ("gemm", "nvjet", "cutlass", "wgmma", "sgemm", "cublas"),
}


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "other"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
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
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--output", type=Path, default=None, help="append the results as JSON lines"
    )
    return parser.parse_args()


def run_request(engine: Any, args: argparse.Namespace, length: int, on_step: Any) -> list[float]:
    """Seconds of each step of one request."""
    import random

    from vllm import SamplingParams

    rng = random.Random(length)
    canvas = min(args.canvas, length - 1)
    vocab_size = engine.vllm_config.model_config.get_vocab_size()
    prompt = [rng.randrange(10, min(1000, vocab_size - 10)) for _ in range(length - canvas)]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=canvas,
        ignore_eos=True,
        detokenize=False,
        extra_args={"diffusion_steps": args.steps, "diffusion_block_length": canvas},
    )
    engine.add_request(f"{length}-{time.time()}", {"prompt_token_ids": prompt}, params)
    seconds: list[float] = []
    request_ids = list(engine.output_processor.request_states)
    while engine.has_unfinished_requests():
        with on_step(len(seconds)):
            started = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - started)
        if args.max_steps and len(seconds) >= args.max_steps:
            engine.abort_request(request_ids, internal=True)
            engine.step()
            break
    return seconds


def main() -> None:
    args = parse()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import contextlib

    import torch
    from vllm import LLM
    from vllm import __version__ as vllm_version

    path = SHAPES / args.model if (SHAPES / args.model).is_dir() else Path(args.model)
    longest = max(args.lengths)
    llm = LLM(
        str(path),
        skip_tokenizer_init=True,
        load_format=args.load_format,
        dtype=args.dtype,
        quantization=args.quantization,
        max_model_len=longest,
        max_num_batched_tokens=longest,
        max_num_seqs=4,
        gpu_memory_utilization=args.gpu_memory_utilization,
        attention_backend=args.backend,
        hf_overrides={"max_sequence_length": longest, "max_position_embeddings": longest},
        additional_config={
            "sparsed": {
                "skip": args.skip,
                "select": args.select,
                "block_size": args.block_size,
                "max_canvas": args.canvas,
            }
        },
    )
    engine = llm.llm_engine
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "CPU"
    sparse = args.backend.lower() == "sparsed"
    pattern_step = int(args.steps * args.skip) + 1

    def no_profile(step: int) -> Any:
        return contextlib.nullcontext()

    for length in args.lengths:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = run_request(engine, args, length, no_profile)
        row: dict[str, Any] = {
            "model": args.model,
            "backend": args.backend,
            "length": length,
            "canvas": min(args.canvas, length - 1),
            "dtype": args.dtype,
            "quantization": args.quantization,
            "steps": len(seconds),
            "device": device,
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
        if cuda:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        print(json.dumps(row), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if args.profile:
            profile(
                engine,
                args,
                length,
                {"dense": 2, "sparse": pattern_step + 2} if sparse else {"dense": 2},
            )


def profile(engine: Any, args: argparse.Namespace, length: int, wanted: dict[str, int]) -> None:
    """Device time of one step by kind of kernel, and its ten longest kernels."""
    import contextlib

    import torch

    activity = torch.profiler.ProfilerActivity
    activities = [activity.CUDA] if torch.cuda.is_available() else [activity.CPU]
    traces: dict[int, Any] = {}

    @contextlib.contextmanager
    def on_step(step: int) -> Any:
        if step not in wanted.values():
            yield
            return
        with torch.profiler.profile(activities=activities) as trace:
            yield
        traces[step] = trace

    run_request(engine, args, length, on_step)
    for name, step in wanted.items():
        if step not in traces:
            continue
        kinds: dict[str, float] = {}
        rows = []
        for event in traces[step].key_averages():
            if torch.cuda.is_available() and event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            micros = event.self_device_time_total or event.self_cpu_time_total
            kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + micros
            rows.append((micros, event.count, event.key[:90]))
        total = sum(kinds.values())
        shares = {kind: f"{t / 1e3:.2f} ms ({t / total:.1%})" for kind, t in sorted(kinds.items())}
        print(f"{args.model} {args.backend} {length} {name} step: {shares}", flush=True)
        for micros, count, key in sorted(rows, reverse=True)[:10]:
            print(f"    {micros / 1e3:9.3f} ms  x{count:<5} {key}", flush=True)


if __name__ == "__main__":
    main()
