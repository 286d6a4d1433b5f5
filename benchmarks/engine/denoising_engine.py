"""An engine in this process whose denoising steps are taken and timed one by one."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

SHAPES: Final = Path(__file__).resolve().parents[1] / "shapes"

OnStep = Callable[[int], AbstractContextManager[Any]]
"""What surrounds a step, by its index: a profiler, say."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with.

    Attributes:
        model: a folder of benchmarks/shapes, or a path.
        max_length: tokens of the longest request, prompt and canvas.
        canvas: longest canvas in tokens, which the pattern store is sized for.
        backend: sparsed, or a dense backend of vLLM.
        more: further arguments of `vllm.LLM`.
    """

    model: str
    max_length: int
    canvas: int
    backend: str = "sparsed"
    skip: float = 0.2
    select: float = 0.3
    block_size: int = 128
    dtype: str = "bfloat16"
    quantization: str | None = None
    load_format: str = "dummy"
    more: Mapping[str, Any] | None = None


def model_path(model: str) -> Path:
    """The folder of a shape or of a checkpoint."""
    return SHAPES / model if (SHAPES / model).is_dir() else Path(model)


def has_weights(model: str) -> bool:
    """Whether the folder is a checkpoint rather than a shape."""
    return any(model_path(model).glob("*.safetensors"))


def start_engine(options: EngineOptions) -> Any:
    """A `vllm.LLM` whose engine core runs in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "max_num_seqs": 4,
        "max_num_batched_tokens": options.max_length,
        "hf_overrides": {
            "max_sequence_length": options.max_length,
            "max_position_embeddings": options.max_length,
        },
        **(options.more or {}),
    }
    return LLM(
        str(model_path(options.model)),
        load_format=options.load_format,
        dtype=options.dtype,
        quantization=options.quantization,
        max_model_len=options.max_length,
        attention_backend=options.backend,
        additional_config={
            "sparsed": {
                # Sparse steps are what is measured, also where dense ones would be faster.
                "dense_if_faster": False,
                "skip": options.skip,
                "select": options.select,
                "block_size": options.block_size,
                "max_canvas": options.canvas,
            }
        },
        **arguments,
    )


def runner_of(llm: Any) -> Any:
    """The model runner of an engine in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def stop_engine(llm: Any) -> None:
    """Free what the engine holds."""
    llm.llm_engine.engine_core.shutdown()


def no_context(step: int) -> AbstractContextManager[Any]:
    """Nothing around a step."""
    return contextlib.nullcontext()


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Token ids that are neither special nor the same in every place."""
    generator = random.Random(seed)
    return [generator.randrange(10, min(1000, vocab_size - 10)) for _ in range(length)]


@dataclass(frozen=True, slots=True)
class RequestRun:
    """One request, taken step by step.

    Attributes:
        seconds: of each step, scheduler and output included.
        tokens: the canvas, as far as it was handed out.
    """

    seconds: list[float]
    tokens: list[int]


def run_request(
    engine: Any,
    *,
    length: int,
    canvas: int,
    steps: int,
    max_steps: int = 0,
    on_step: OnStep = no_context,
    extra_args: Mapping[str, Any] | None = None,
) -> RequestRun:
    """Run one request alone.

    Args:
        engine: `LLM.llm_engine`, its core in this process.
        length: tokens of prompt and canvas.
        canvas: tokens to generate, in one block.
        steps: denoising steps of the whole request.
        max_steps: abort after so many; 0: run to the end.
        on_step: surrounds each step.
        extra_args: further parameters of the request.
    """
    from vllm import SamplingParams

    vocab_size = engine.vllm_config.model_config.get_vocab_size()
    params = SamplingParams(
        temperature=0.0,
        max_tokens=canvas,
        ignore_eos=True,
        detokenize=False,
        extra_args={
            "diffusion_steps": steps,
            "diffusion_block_length": canvas,
            **(extra_args or {}),
        },
    )
    prompt = random_prompt(length - canvas, vocab_size, seed=length)
    engine.add_request(f"{length}-{time.time()}", {"prompt_token_ids": prompt}, params)
    request_ids = list(engine.output_processor.request_states)
    seconds: list[float] = []
    tokens: list[int] = []
    try:
        while engine.has_unfinished_requests():
            with on_step(len(seconds)):
                started = time.perf_counter()
                outputs = engine.step()
                seconds.append(time.perf_counter() - started)
            for output in outputs:
                tokens = list(output.outputs[0].token_ids)
            if max_steps and len(seconds) >= max_steps:
                break
    finally:
        if engine.has_unfinished_requests():
            # Also where a step failed: the next request is to run alone.
            engine.abort_request(request_ids, internal=True)
            engine.step()
    return RequestRun(seconds, tokens)
