"""Parts of the question about a document, all of it with a made-up server, and the whole."""

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from examples import ask_long_document
from examples.ask_long_document import SETTINGS, Answer, Counters, long_document
from small_model.tasks import LOOKUP_TASKS, TASKS, canvas_of, is_correct
from small_model.training.data import Encoder
from tests.examples.fake_vllm import ANSWERING_SERVER, write_program

PAGE = """\
# HELP vllm:diffusion_num_denoising_steps_total Denoising steps of requests.
# TYPE vllm:diffusion_num_denoising_steps_total counter
vllm:diffusion_num_denoising_steps_total{{model_name="m",engine="0",attention="dense"}} {0}
vllm:diffusion_num_denoising_steps_total{{model_name="m",engine="0",attention="building"}} 0.0
vllm:diffusion_num_denoising_steps_total{{model_name="m",engine="0",attention="sparse"}} {1}
# TYPE vllm:diffusion_num_committed_tokens_total counter
vllm:diffusion_num_committed_tokens_total {{model_name="m",engine="0"}} {2}
# TYPE vllm:sparsed_kept_blocks_total counter
vllm:sparsed_kept_blocks_total {3}
# TYPE vllm:sparsed_candidate_blocks_total counter
vllm:sparsed_candidate_blocks_total {4}
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0"}} 9.0
"""


def test_counters_of_one_request() -> None:
    before = Counters.parse(PAGE.format("40.0", "24.0", "64.0", "9792.0", "27744.0"))
    after = Counters.parse(PAGE.format("48.0", "48.0", "128.0", "1.9584e+04", "5.2224e+04"))
    assert before == Counters(40, 24, 64, 9792, 27744)
    assert after - before == Counters(8, 24, 64, 9792, 24480)
    assert (after - before).tokens_per_pass == 2.0
    assert (after - before).density == pytest.approx(0.4)


def test_counters_without_patterns() -> None:
    counted = Counters.parse(PAGE.format("72.0", "24.0", "40.0", "7.0", "9.0"))
    counted -= Counters(40, 24, 8, 7, 9)
    assert counted == Counters(32, 0, 32, 0, 0)
    assert counted.density == 1.0
    # As on the page of a server with several API processes.
    assert Counters.parse("# TYPE a counter\na_total 1.0\n") == Counters(0, 0, 0, 0, 0)
    assert Counters(0, 0, 0, 0, 0).tokens_per_pass == 0.0


@pytest.mark.parametrize("task", TASKS)
def test_document_is_long_enough(task: str, random_model: Path) -> None:
    count, canvas = Encoder(random_model).count, canvas_of(task)
    document = long_document(task, 0, 4000, count, canvas)
    assert 4000 <= count(document.text) < 4300
    (question,) = document.questions
    assert count(question.answer) < canvas
    if task in LOOKUP_TASKS:
        # What is asked for is in the text.
        assert all(word in document.text for word in question.answer.split(", "))
    assert document == long_document(task, 0, 4000, count, canvas)
    assert document.text != long_document(task, 1, 4000, count, canvas).text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (" 12345\n", "  -> right"),
        ("12354", "  -> WRONG: '12354' in place of '12345'"),
        ("", "  -> WRONG: '' in place of '12345'"),
    ],
    ids=["right", "wrong", "empty"],
)
def test_verdict(answer: str, said: str) -> None:
    assert ask_long_document.verdict(answer, "12345") == said
    assert is_correct(answer, "12345") == ("right" in said)


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    ask_long_document.show_figures(
        {
            "exact": Answer("1", 2.0, 20.0, Counters(64, 0, 64, 0, 0)),
            "fast": Answer("1", 1.5, 5.0, Counters(16, 0, 64, 0, 0)),
            "fast, sparse": Answer("1", 1.5, 4.0, Counters(8, 24, 64, 9792, 27744)),
        }
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["exact", "64", "1.00", "2.0", "s", "20.0", "s", "0", "-"]
    assert lines[3].split() == ["fast", "16", "4.00", "1.5", "s", "5.0", "s", "0", "-"]
    assert lines[4].split()[:4] == ["fast,", "sparse", "32", "2.00"]
    assert lines[4].split()[-2:] == ["24", "35.3%"]
    assert lines[5].startswith("Deciding all that the model is sure of took 4.0 times less time.")


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_server_options(cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    options = argparse.Namespace(
        model=str(tmp_path), document_tokens=4000, canvas=32, server_options=["--dtype", "half"]
    )
    expected = ["--attention-backend", "sparsed", "--max-model-len", "4660"]
    expected += [] if cuda else ["--dtype", "float32"]
    assert ask_long_document.server_options(options) == [*expected, "--dtype", "half"]


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ask_long_document.py", *arguments])
    monkeypatch.setattr(ask_long_document.signal, "signal", lambda number, handler: None)
    return ask_long_document.main()


@pytest.mark.parametrize("wrong", [None, *SETTINGS])
def test_against_a_made_up_server(
    wrong: str | None,
    fake_vllm: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_program(fake_vllm, ANSWERING_SERVER)
    if wrong:
        fake_vllm.with_name("wrong").write_text(wrong)
    status = run_main(
        monkeypatch, "--model", "some/model", "--document-tokens", "500", "--task", "multi_key"
    )
    assert status == (1 if wrong else 0)
    printed = capsys.readouterr().out
    assert re.search(r"A document of 5\d\d tokens in \d+ lines:\n  \| .", printed)
    key = re.search(r"Question: What is the access code of the ([a-z ]+)\?\n", printed)
    assert key
    for kind in SETTINGS:
        part = printed.partition(f"\n{kind.capitalize()}:\n")[2]
        shown, said = part.splitlines()[:2]
        assert re.fullmatch(r"  00\d{8}" if wrong == kind else r"  \d{8}", shown)
        assert said.split()[1] == ("WRONG:" if wrong == kind else "right")
    seconds = r" +\d+\.\d s +\d+\.\d s "
    assert re.search(rf"^exact +32 +0\.75{seconds} +0 +-$", printed, re.MULTILINE)
    assert re.search(rf"^fast +12 +2\.00{seconds} +0 +-$", printed, re.MULTILINE)
    assert re.search(rf"^fast, sparse +12 +2\.00{seconds} +8 +30\.0%$", printed, re.MULTILINE)
    assert printed.endswith("The server has been stopped.\n")


def test_failed_start_is_reported(
    fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_program(fake_vllm, "import sys; print('no such option'); sys.exit(3)")
    assert run_main(monkeypatch, "--model", "some/model") == 1
    printed = capsys.readouterr()
    assert "no such option" in printed.err
    assert "The server ended with status 3 while starting" in printed.err


def test_refused_request_is_reported(
    fake_vllm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = "def do_POST(self):\n        if 'messages' in self.path or 'chat' in self.path:\n"
    refusing += "            print('too long', flush=True)\n"
    refusing += "            return self.send_error(400, 'prompt too long')\n"
    write_program(fake_vllm, ANSWERING_SERVER.replace("def do_POST(self):\n", refusing))
    assert (
        run_main(
            monkeypatch, "--model", "some/model", "--document-tokens", "200", "--task", "multi_key"
        )
        == 1
    )
    printed = capsys.readouterr()
    assert "too long" in printed.err
    assert "Error code: 400" in printed.err
    assert "The end of its log is above." in printed.err


def run_script(folder: Path, tokens: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ask_long_document.__file__, "--document-tokens", str(tokens), *arguments],
        cwd=folder,
        text=True,
        capture_output=True,
        timeout=600,
    )


# The demo's test goes the same way; here the answers are wrong.
@pytest.mark.slow
def test_all_of_it_with_random_weights(tmp_path: Path, random_model: Path) -> None:
    """Streaming, steps and density are real; the answers are not, and it says so."""
    done = run_script(tmp_path, 600, "--model", str(random_model), "--task", "multi_key")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"A document of 6\d\d tokens", done.stdout)
    row = re.search(r"^fast, sparse .* ([\d.]+)%$", done.stdout, re.MULTILINE)
    assert row
    assert 20 < float(row[1]) < 100
    assert re.search(r"^exact +\d+ +\d+\.\d\d .* 0 +-$", done.stdout, re.MULTILINE)
    assert done.stdout.count("\n  -> WRONG: ") == 3
    assert done.stdout.endswith("The server has been stopped.\n")


def test_the_small_model_answers(tmp_path: Path) -> None:
    """As `make demo` does."""
    done = run_script(tmp_path, 1000)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n  -> right\n") == 3
    rows = re.findall(r"^(exact|fast|fast, sparse) +(\d+) +([\d.]+) ", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(SETTINGS)
    fast, _, exact = (int(passes) for _, passes, _ in rows)
    assert exact >= 60
    assert fast <= exact / 1.5
    assert re.search(r"^fast, sparse .* [1-9]\d* +[\d.]+%$", done.stdout, re.MULTILINE)
    assert done.stdout.endswith("The server has been stopped.\n")


def test_stops_the_server_on_interrupt(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, ask_long_document.__file__],
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
