"""Runs `vllm bench serve`, in this process, with several clients and reads its result."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.serving.server import complete
from examples.local_server import ServerError

FILE: Final = "serving.csv"
LOG: Final = "bench_serve.log"
PERCENTILES: Final = (50, 90, 99)
ATTENTION: Final = ("sparse", "dense")
"""Whether requests use SparseD; "dense" asks for `sparsed_enabled` false."""

COLUMNS: Final = (
    *("model", "backend", "dtype", "clients", "requests", "completed", "failed"),
    *("input_len", "output_len", "range_ratio", "steps", "attention", "seconds"),
    *("requests_per_s", "output_tokens_per_s", "total_tokens_per_s"),
    *(f"first_block_ms_p{p}" for p in PERCENTILES),
    *(f"latency_ms_p{p}" for p in PERCENTILES),
    "note",
)


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients ask for.

    Attributes:
        clients: requests under way at once.
        requests: of all clients together.
        input_len: mean tokens of a prompt.
        output_len: mean tokens of a canvas.
        range_ratio: both vary evenly by this share, up and down.
        steps: denoising steps of a request.
        attention: one of ATTENTION.
    """

    clients: int
    requests: int
    input_len: int
    output_len: int
    range_ratio: float
    steps: int
    attention: str = "sparse"

    @property
    def parameters(self) -> dict[str, object]:
        """Of each request, beside vLLM's own."""
        dense = {} if self.attention == "sparse" else {"sparsed_enabled": False}
        return {"diffusion_steps": self.steps, **dense}

    @property
    def longest(self) -> int:
        """Tokens of the longest possible request, prompt and canvas."""
        return int((self.input_len + self.output_len) * (1 + self.range_ratio)) + 2


def check_answers(address: str, model: str, load: Load) -> None:
    """Ask the same twice: all tokens must come, and both times the same text.

    Raises:
        ServerError: they do not.
    """
    body = {
        "model": model,
        "prompt": [10 + i % 90 for i in range(min(64, load.input_len))],
        "max_tokens": load.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "vllm_xargs": load.parameters,
    }
    answers = [complete(address, body) for _ in range(2)]
    tokens = [answer["usage"]["completion_tokens"] for answer in answers]
    if tokens != [load.output_len] * 2:
        raise ServerError(f"{load.output_len} tokens asked for, {tokens} came")
    first, second = (answer["choices"][0]["text"] for answer in answers)
    if first != second:
        raise ServerError("the same request was answered differently at temperature 0")


def run_load(
    address: str, model: str, tokenizer: str, load: Load, folder: Path, time_limit: float
) -> dict[str, Any]:
    """Put the server under load.

    Args:
        address: of the server, without /v1.
        model: its name there.
        tokenizer: folder or name of its tokenizer.
        load: what the clients ask for.
        folder: where what the command prints is appended to LOG.
        time_limit: seconds.

    Returns:
        The result of `vllm bench serve`.

    Raises:
        ServerError: it failed or did not end in time.
    """
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # As the `vllm` command does: the tokenizer's folder names a model that only the plugin knows.
    load_general_plugins()
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    parsed = parser.parse_args(bench_arguments(address, model, tokenizer, load)[2:])

    async def run() -> dict[str, Any]:
        result: dict[str, Any] = await asyncio.wait_for(main_async(parsed), time_limit)
        return result

    with (folder / LOG).open("a") as log, contextlib.redirect_stdout(log):
        try:
            return asyncio.run(run())
        except TimeoutError as error:
            raise ServerError(f"vllm bench serve was not done after {time_limit:.0f} s") from error
        except Exception as error:
            # Whatever it raises, the loads after this one can still be run.
            raise ServerError(f"vllm bench serve failed: {error}") from error


def bench_arguments(address: str, model: str, tokenizer: str, load: Load) -> list[str]:
    """What `vllm` is called with."""
    extra = {"vllm_xargs": load.parameters}
    options: dict[str, object] = {
        "--backend": "openai",
        "--base-url": address,
        "--endpoint": "/v1/completions",
        "--model": model,
        "--tokenizer": tokenizer,
        "--dataset-name": "random",
        "--random-input-len": load.input_len,
        "--random-output-len": load.output_len,
        "--random-range-ratio": load.range_ratio,
        "--num-prompts": load.requests,
        "--max-concurrency": load.clients,
        "--num-warmups": min(2, load.clients),
        "--percentile-metrics": "ttft,e2el",
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        "--temperature": 0,
        "--extra-body": json.dumps(extra),
    }
    flat = [str(text) for option in options.items() for text in option]
    return ["bench", "serve", *flat, "--ignore-eos", "--disable-tqdm"]


def row_of(load: Load, result: dict[str, Any]) -> dict[str, object]:
    """One row of the table from a result of `vllm bench serve`."""
    times: dict[str, object] = {}
    for p in PERCENTILES:
        times[f"first_block_ms_p{p}"] = result[f"p{p}_ttft_ms"]
        times[f"latency_ms_p{p}"] = result[f"p{p}_e2el_ms"]
    return describe(load) | {
        "completed": result["completed"],
        "failed": result["failed"],
        "seconds": result["duration"],
        "requests_per_s": result["request_throughput"],
        "output_tokens_per_s": result["output_throughput"],
        "total_tokens_per_s": result["total_token_throughput"],
        **times,
    }


def describe(load: Load) -> dict[str, object]:
    """The columns that say what was asked for."""
    return {
        "clients": load.clients,
        "requests": load.requests,
        "input_len": load.input_len,
        "output_len": load.output_len,
        "range_ratio": load.range_ratio,
        "steps": load.steps,
        "attention": load.attention,
    }
