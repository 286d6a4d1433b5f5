"""The demo: its tokenizer, how it ends, and the whole of it."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import demo
from tests.examples.fake_vllm import write_program


def test_tokenizer_round_trip(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = demo.copy_with_tokenizer(demo.CHECKPOINT, tmp_path / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = [16, 365, 0, 382, 7]
    assert tokenizer("w16 w365 w0 w382 w7").input_ids == tokens
    assert tokenizer.decode(tokens) == "w16 w365 w0 w382 w7"
    # The mask and the end token of the checkpoint's config do not show.
    assert tokenizer.decode([16, 383, 365, 2], skip_special_tokens=True) == "w16 w365"
    assert (
        tokenizer.eos_token_id == json.loads((folder / "config.json").read_text())["eos_token_id"]
    )


def test_failed_start_is_reported(
    fake_vllm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_program(fake_vllm, "import sys; print('no such option'); sys.exit(3)")
    monkeypatch.setattr(demo.sys, "argv", ["demo.py", "--model", "some/model"])
    monkeypatch.setattr(demo.signal, "signal", lambda number, handler: None)
    assert demo.main() == 1
    printed = capsys.readouterr()
    assert "no such option" in printed.err
    assert "The server ended with status 3 while starting." in printed.err


def test_demo_streams_an_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, demo.__file__], cwd=tmp_path, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pieces = re.findall(r"^  \[ *[\d.]+ s\] (.+)$", done.stdout, re.MULTILINE)
    words = " ".join(pieces).split()
    assert len(words) == 64
    assert all(re.fullmatch(r"w\d+", word) for word in words)
    # A final prefix streams before its block is whole: at least one piece a block.
    assert len(pieces) >= 4
    assert f"64 tokens in {len(pieces)} pieces" in done.stdout
    assert done.stdout.endswith("The server has been stopped.\n")


def test_demo_stops_the_server_on_interrupt(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, demo.__file__],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        # A shell that runs the tests in its background has them ignore the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Starting"):
            port = line.split()[line.split().index("--port") + 1]
            break
    time.sleep(5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert port.encode() not in arguments.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
