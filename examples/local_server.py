"""A `vllm serve` process of one's own: started, waited for, and stopped whatever happens.

The examples, the benchmarks and the tests of the server all start theirs here.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

START_LIMIT: Final = 900.0  # seconds; a large checkpoint is read from disk in this time
STOP_LIMIT: Final = 30.0  # seconds from the signal to a forced end
LOG_TAIL: Final = 40  # lines of the log that an error shows


class ServerError(RuntimeError):
    """The server did not start, or answered wrongly."""


@contextlib.contextmanager
def served(
    model: str | Path,
    options: Sequence[str],
    log: Path,
    *,
    name: str,
    environment: Mapping[str, str] | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Iterator[str]:
    """Run `vllm serve` on a free port of this machine until the block ends.

    Args:
        model: folder or Hugging Face name.
        options: for `vllm serve`; the last of several counts.
        log: file for what the server prints.
        name: of the model in requests.
        environment: variables beside those of this process.
        say: is told what goes on.

    Yields:
        The server's address, without /v1, once it is healthy.

    Raises:
        ServerError: the server ends before it is healthy, or takes longer than START_LIMIT; holds
            the end of its log.
    """
    port = free_port()
    command = [*vllm_command(), "serve", str(model), "--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    say(f"Starting (half a minute, more for a large model): {' '.join(command)}")
    log.parent.mkdir(parents=True, exist_ok=True)
    # A server's engine has its own process, also where this one keeps its engines inside.
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **(environment or {})}
    with log.open("wb") as output:
        # Its own process group: Ctrl-C reaches this program alone, which then stops the server.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        seconds = _wait_until_healthy(process, address, log)
        say(f"Healthy after {seconds:.0f} s.")
        yield address
    finally:
        _stop(process, say)


def vllm_command() -> list[str]:
    """How to run the `vllm` command of this environment."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def log_tail(log: Path) -> str:
    """The last lines of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL:])


def _wait_until_healthy(process: subprocess.Popen[bytes], address: str, log: Path) -> float:
    """Seconds until the server answered."""
    start = time.monotonic()
    while time.monotonic() - start < START_LIMIT:
        if process.poll() is not None:
            what = f"The server ended with status {process.returncode} while starting"
            raise ServerError(f"{what}; the end of its log:\n{log_tail(log)}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"{address}/health", timeout=5),
        ):
            return time.monotonic() - start
        time.sleep(0.5)
    what = f"The server was not healthy after {START_LIMIT:.0f} s"
    raise ServerError(f"{what}; the end of its log:\n{log_tail(log)}")


def _stop(process: subprocess.Popen[bytes], say: Callable[[str], object]) -> None:
    """Ask the server to end, and make an end of whatever is left of its process group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            say(f"The server did not stop within {STOP_LIMIT:.0f} s.")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
