"""What an engine step costs beside the model: scheduler, runner, output.

    python -m benchmarks.serving.overhead --batch-sizes 1 4 16 64

A tiny model in an engine in this process. Each part is timed by the clock, around the methods that
do it; the device is waited for before and after the forward pass and the decoding, so that their
time is theirs alone. The wall clock of a step is measured in a run without these waits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.engine.denoising_engine import (
    EngineOptions,
    has_weights,
    random_prompt,
    runner_of,
    start_engine,
    stop_engine,
)
from benchmarks.measuring.environment import headline
from benchmarks.measuring.rows import DEFAULT_FOLDER, RowFile
from benchmarks.measuring.timing import synchronize
from benchmarks.serving.checkpoint import with_tokenizer

FILE: Final = "overhead.csv"
OVERHEAD: Final = ("scheduler", "runner", "output")
"""Parts that are overhead: picking requests; packing and bookkeeping; tokens back to the client,
detokenizer included."""

PARTS: Final = (*OVERHEAD, "model", "sampler")
COLUMNS: Final = (
    *("model", "batch_size", "length", "canvas", "steps", "measured_steps", "wall_ms"),
    *("overhead_ms", "overhead_ms_p80", *(f"{part}_ms" for part in PARTS)),
)
TINY_MODEL: Final = "tests/golden/llada-mha"


class StepClock:
    """Times the parts of engine steps; it wraps methods of the engine's objects while it runs."""

    def __init__(self, llm: Any, device: str) -> None:
        """Prepare for an engine whose core is in this process."""
        core = llm.llm_engine.engine_core.engine_core
        runner = runner_of(llm)
        self._device = device
        self._spent: dict[str, float] = {}
        self._wrapped: list[tuple[Any, str]] = []
        self._targets = (
            (core.scheduler, "schedule", "schedule", False),
            (runner, "execute_model", "execute", False),
            (runner, "run_pass", "model", True),
            (runner.decoder, "decode", "sampler", True),
        )

    def __enter__(self) -> StepClock:
        for owner, method, part, on_device in self._targets:
            setattr(owner, method, self._timed(getattr(owner, method), part, on_device))
            self._wrapped.append((owner, method))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, method in self._wrapped:
            # The class's own method shows again.
            delattr(owner, method)
        self._wrapped.clear()

    def step(self, engine: Any) -> dict[str, float]:
        """Seconds of the PARTS of one step of `LLM.llm_engine`."""
        self._spent = dict.fromkeys(("schedule", "execute", "model", "sampler"), 0.0)
        synchronize(self._device)
        started = time.perf_counter()
        engine.step()
        wall = time.perf_counter() - started
        spent = self._spent
        return {
            "scheduler": spent["schedule"],
            "runner": spent["execute"] - spent["model"] - spent["sampler"],
            "output": wall - spent["schedule"] - spent["execute"],
            "model": spent["model"],
            "sampler": spent["sampler"],
        }

    def _timed(self, method: Callable[..., Any], part: str, on_device: bool) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if on_device:
                synchronize(self._device)
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                if on_device:
                    synchronize(self._device)
                self._spent[part] += time.perf_counter() - started

        return timed


def add_requests(engine: Any, batch_size: int, length: int, canvas: int, steps: int) -> None:
    """Queue a batch of requests, each with a prompt of its own."""
    from vllm import SamplingParams

    vocab_size = engine.vllm_config.model_config.get_vocab_size()
    for index in range(batch_size):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=canvas,
            ignore_eos=True,
            extra_args={"diffusion_steps": steps, "diffusion_block_length": max(1, canvas // 4)},
        )
        prompt = random_prompt(length - canvas, vocab_size, seed=index)
        engine.add_request(
            f"{batch_size}-{index}-{time.time()}", {"prompt_token_ids": prompt}, params
        )


def measure(
    llm: Any, device: str, batch_size: int, length: int, canvas: int, steps: int
) -> dict[str, float]:
    """Medians over the steps of one batch in milliseconds, first and last step left out.

    Raises:
        RuntimeError: a request did not return its whole canvas.
    """
    engine = llm.llm_engine
    add_requests(engine, batch_size, length, canvas, steps)
    walls = []
    tokens: dict[str, int] = {}
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        walls.append(time.perf_counter() - started)
        tokens.update((x.request_id, len(x.outputs[0].token_ids)) for x in outputs)
    if sorted(tokens.values()) != [canvas] * batch_size:
        raise RuntimeError(f"{canvas} tokens of {batch_size} requests, got {tokens}")
    add_requests(engine, batch_size, length, canvas, steps)
    parts = []
    with StepClock(llm, device) as clock:
        while engine.has_unfinished_requests():
            parts.append(clock.step(engine))
    parts, walls = parts[1:-1], walls[1:-1]
    overheads = [sum(step[part] for part in OVERHEAD) * 1e3 for step in parts]
    row = {
        "measured_steps": float(len(parts)),
        "wall_ms": statistics.median(walls) * 1e3,
        "overhead_ms": statistics.median(overheads),
        "overhead_ms_p80": statistics.quantiles(overheads, n=5, method="inclusive")[-1],
    }
    for part in PARTS:
        row[f"{part}_ms"] = statistics.median(step[part] for step in parts) * 1e3
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=TINY_MODEL)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--length", type=int, default=96, help="prompt and canvas, in tokens")
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="the small checkpoints' own precision")
    parser.add_argument("--output", type=Path, default=DEFAULT_FOLDER, help="folder of the CSV")
    options = parser.parse_args(arguments)
    if options.steps < 6:
        parser.error("--steps must be at least 6, of which the first and the last are not counted")
    print(headline(), flush=True)
    with tempfile.TemporaryDirectory(prefix="vllm-sparsed-benchmark-") as folder:
        path = with_tokenizer(Path(options.model), Path(folder) / "model")
        measure_all(options, path)


def measure_all(options: argparse.Namespace, path: Path) -> None:
    """Start an engine of the model in a folder and measure all batch sizes."""
    engine = EngineOptions(
        model=str(path),
        max_length=options.length,
        canvas=options.canvas,
        block_size=16,
        select=0.5,
        dtype=options.dtype,
        load_format="auto" if has_weights(str(path)) else "dummy",
        more={
            "skip_tokenizer_init": False,
            "max_num_seqs": max(options.batch_sizes),
            "max_num_batched_tokens": options.length * max(options.batch_sizes),
        },
    )
    llm = start_engine(engine)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    file = RowFile(options.output / FILE, COLUMNS)
    measure(llm, device, 1, options.length, options.canvas, options.steps)
    for batch_size in options.batch_sizes:
        row: dict[str, object] = {
            "model": options.model,
            "batch_size": batch_size,
            "length": options.length,
            "canvas": options.canvas,
            "steps": options.steps,
            **measure(llm, device, batch_size, options.length, options.canvas, options.steps),
        }
        file.add(row)
        figures = ", ".join(f"{part} {row[f'{part}_ms']:.3f}" for part in PARTS)
        print(
            f"batch {batch_size}: overhead {row['overhead_ms']:.3f} ms a step, of a wall clock of "
            f"{row['wall_ms']:.3f} ms ({figures})",
            flush=True,
        )
    stop_engine(llm)


if __name__ == "__main__":
    main()
