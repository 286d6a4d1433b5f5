"""Serve a diffusion language model over HTTP, send it a prompt, print the answer as it streams in.

Without arguments the model is a small checkpoint with random weights from this repository: the
answer shows that serving, sparse attention and streaming work, and means nothing.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from openai import OpenAI

CHECKPOINT: Final = Path(__file__).resolve().parent.parent / "tests" / "golden" / "llada-mha"
PROMPT: Final = "w16 w365 w116 w266 w72 w23 w214"
START_LIMIT: Final = 900.0  # seconds; a large checkpoint is read from disk in this time
STOP_LIMIT: Final = 30.0  # seconds from the signal to a forced end
LOG_TAIL: Final = 40  # lines of the server's log that a failed start shows


class ServerError(Exception):
    """The server ended, or did not answer in time."""


def main() -> int:
    """Run the demo and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hugging Face name")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the canvas")
    parser.add_argument("--block-length", type=int, default=16, help="tokens decided at a time")
    parser.add_argument(
        "--steps", type=int, default=64, help="denoising steps, all blocks together"
    )
    parser.add_argument("server_options", nargs="*", help="after --: more options for vllm serve")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end_on_signal)
    with tempfile.TemporaryDirectory(prefix="vllm-sparsed-demo-") as folder:
        model = options.model
        if Path(model).is_dir() and not (Path(model) / "tokenizer_config.json").exists():
            model = str(copy_with_tokenizer(Path(model), Path(folder) / "model"))
            print(
                f"{options.model} has random weights and no tokenizer: token 7 is written w7 here,"
                " and the answer means nothing."
            )
        log = Path(folder) / "server.log"
        try:
            with served(model, options.server_options, log) as address:
                print(f"\nPrompt: {options.prompt}\nAnswer: ", end="", flush=True)
                stream_answer(address, options)
        except ServerError as error:
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([*tail, f"{error} The end of its log is above."]), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted; the server has been stopped.", file=sys.stderr)
            return 130
    print("The server has been stopped.")
    return 0


def end_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave through the with statements, so that the server is stopped."""
    sys.exit(128 + number)


def stream_answer(address: str, options: argparse.Namespace) -> None:
    """Send the prompt and print each piece of the answer as it arrives, with its time."""
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    start = time.perf_counter()
    stream = client.completions.create(
        model="demo",
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={
            "ignore_eos": True,
            "vllm_xargs": {
                "diffusion_steps": options.steps,
                "diffusion_block_length": options.block_length,
            },
        },
    )
    pieces = tokens = 0
    for chunk in stream:
        if chunk.choices and chunk.choices[0].text:
            pieces += 1
            print(
                f"\n  [{time.perf_counter() - start:5.2f} s] {chunk.choices[0].text}",
                end="",
                flush=True,
            )
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    elapsed = time.perf_counter() - start
    print(f"\n{tokens} tokens in {pieces} pieces, {elapsed:.2f} s\n")
    if not pieces:
        raise ServerError("The server answered with no text.")


@contextmanager
def served(model: str, options: list[str], log: Path) -> Iterator[str]:
    """Run `vllm serve` with sparse attention; yield its address once it is healthy, then stop it.

    Raises ServerError when the server ends before that or takes longer than START_LIMIT.
    """
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model]
    command += ["--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--attention-backend", "sparsed"]
    if Path(model).is_dir():
        # The checkpoints in this repository are meant for float32, which a CPU is fastest at too.
        command += ["--dtype", "float32", "--max-model-len", "512"]
    command += options
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
                print(f"Healthy after {time.monotonic() - start:.0f} s.")
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


def copy_with_tokenizer(checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint to folder and add a tokenizer in which token 7 is the word "w7".

    The mask token is special, so that it does not show in decoded text. Returns folder.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    vocabulary = {f"w{token}": token for token in range(config["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    mask, end = f"w{config['mask_token_id']}", f"w{config['eos_token_id']}"
    tokenizer.add_special_tokens([mask, end])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "mask_token": mask,
        "eos_token": end,
        "model_max_length": config.get("max_sequence_length"),
        "clean_up_tokenization_spaces": False,
        # Messages one after another, roles left out: enough to try the chat interface.
        "chat_template": "{{ messages | map(attribute='content') | join(' ') }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return folder


if __name__ == "__main__":
    sys.exit(main())
