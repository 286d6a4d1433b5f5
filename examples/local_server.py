"""A `vllm serve` process of one's own: started, waited for, and stopped whatever happens."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

START_LIMIT: Final = 900.0  # seconds; a large checkpoint is read from disk in this time
STOP_LIMIT: Final = 30.0  # seconds from the signal to a forced end
NAME: Final = "demo"  # of the model in requests


class ServerError(Exception):
    """The server ended, or did not answer in time."""


@contextmanager
def served(model: str, options: list[str], log: Path) -> Iterator[str]:
    """Run `vllm serve` with sparse attention; yield its address once it is healthy, then stop it.

    Args:
        model: folder or Hugging Face name.
        options: more options for `vllm serve`.
        log: file for what the server prints.

    Raises:
        ServerError: the server ends before it is healthy, or takes longer than START_LIMIT.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--attention-backend", "sparsed", *options]
    print("Starting (half a minute, more for a large model):", *command, flush=True)
    with log.open("w") as output:
        # Its own process group: Ctrl-C reaches this program alone, which then stops the server.
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, address)
        yield address
    finally:
        stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], address: str) -> None:
    """Return once the server answers; raise ServerError when it ends or START_LIMIT has passed."""
    start = time.monotonic()
    while time.monotonic() - start < START_LIMIT:
        if process.poll() is not None:
            raise ServerError(f"The server ended with status {process.returncode} while starting.")
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                print(f"Healthy after {time.monotonic() - start:.0f} s.", flush=True)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise ServerError(f"The server was not healthy after {START_LIMIT:.0f} s.")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and make an end of whatever is left of its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            print(f"The server did not stop within {STOP_LIMIT:.0f} s.", file=sys.stderr)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
