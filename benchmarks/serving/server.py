"""`vllm serve` for the time of a benchmark."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

SERVED_NAME: Final = "benchmark"
START_LIMIT: Final = 600.0  # seconds
STOP_LIMIT: Final = 30.0  # seconds from the signal to a forced end


class ServerError(RuntimeError):
    """The server did not start, or answered wrongly."""


def vllm_command() -> list[str]:
    """How to run the `vllm` command of this environment."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@contextlib.contextmanager
def served(
    model: Path, options: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server on a free port of this machine; yields its address without /v1.

    Args:
        model: folder that it serves.
        options: of `vllm serve`.
        log: file for what it prints.
        environment: variables that it has beside this process's.

    Raises:
        ServerError: it ended while starting, or took longer than START_LIMIT; holds the end of its
            log.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [*vllm_command(), "serve", str(model), "--served-model-name", SERVED_NAME]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        # Its own session, so that all of its processes can be ended together.
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})},
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, address, log)
        yield address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=STOP_LIMIT)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/health", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    end = log.read_text(errors="replace")[-4000:]
    raise ServerError(f"vllm serve did not start; the end of its log:\n{end}")


def complete(address: str, body: dict[str, Any]) -> dict[str, Any]:
    """Answer of /v1/completions to a request."""
    request = urllib.request.Request(
        f"{address}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def model_name(address: str) -> str:
    """The first model that a server names."""
    with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name
