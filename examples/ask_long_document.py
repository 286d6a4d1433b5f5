"""Serve a diffusion language model over HTTP and ask it for a long answer, exactly and fast.

    python examples/ask_long_document.py
    python examples/ask_long_document.py --model GSAI-ML/LLaDA-8B-Instruct --document-tokens 3000

Without arguments the model is this repository's small one. The answer is shown as it appears: as
many tokens a pass as the model is sure of, these with sparse attention, then one a pass with dense
attention. Each is checked against the one that is known, and what it took is read from the server's
counters.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any, Final

from openai import APIError, OpenAI
from prometheus_client.parser import text_string_to_metric_families

# A script finds the modules beside it, not those of the repository's other folders.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.local_server import ServerError, log_tail, served
from small_model.tasks import (
    TASKS,
    CountTokens,
    Document,
    Limits,
    canvas_of,
    is_correct,
    make_document,
)

TASK: Final = "ledger"
"""The longest answers that the small model gets right: twelve lines, each building on the last."""

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "fast": {"sparsed_enabled": False, "diffusion_threshold": 0.9},
    # Also where dense attention would be faster.
    "fast, sparse": {"sparsed_dense_if_faster": False, "diffusion_threshold": 0.9},
    "exact": {"sparsed_enabled": False},
}
"""Parameters of the requests: one token a pass, and what the model is sure of."""

SMALL_MODEL: Final = Path(__file__).resolve().parents[1] / "llada-yardstick-6m"
NAME: Final = "demo"  # of the model in requests
SHOWN_LINES: Final = 3  # of the document's beginning
WARM_UP_STEPS: Final = 3  # two dense ones, the second with the patterns, and a sparse one
BLOCK_LENGTH: Final = 32


@dataclass(frozen=True, slots=True)
class Counters:
    """What /metrics has counted since the server started; differences are one request's.

    Attributes:
        dense: denoising steps with full attention.
        sparse: denoising steps with a pattern.
        decided: tokens decided in them.
        kept: key blocks that the patterns keep.
        candidates: key blocks that they chose from.
    """

    dense: float
    sparse: float
    decided: float
    kept: float
    candidates: float

    @classmethod
    def parse(cls, page: str) -> "Counters":
        """Read them from a page in Prometheus' text format; one that is missing counts as 0."""
        values: defaultdict[tuple[str, str | None], float] = defaultdict(float)
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                values[sample.name, sample.labels.get("attention")] += sample.value
        steps = "vllm:diffusion_num_denoising_steps_total"
        return cls(
            # The step in which the patterns are built is a dense one.
            dense=values[steps, "dense"] + values[steps, "building"],
            sparse=values[steps, "sparse"],
            decided=values["vllm:diffusion_num_committed_tokens_total", None],
            kept=values["vllm:sparsed_kept_blocks_total", None],
            candidates=values["vllm:sparsed_candidate_blocks_total", None],
        )

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            dense=self.dense - earlier.dense,
            sparse=self.sparse - earlier.sparse,
            decided=self.decided - earlier.decided,
            kept=self.kept - earlier.kept,
            candidates=self.candidates - earlier.candidates,
        )

    @property
    def passes(self) -> float:
        return self.dense + self.sparse

    @property
    def tokens_per_pass(self) -> float:
        return self.decided / self.passes if self.passes else 0.0

    @property
    def density(self) -> float:
        """Share of the key blocks that sparse steps attend to; 1 where no pattern was built."""
        return self.kept / self.candidates if self.candidates else 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer, and what the server counted meanwhile.

    Attributes:
        first: seconds until its first text.
        seconds: until its end.
    """

    text: str
    first: float
    seconds: float
    counted: Counters


def main() -> int:
    """Ask; the exit status is 0 where all answers are right."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(SMALL_MODEL), help="folder or Hugging Face name")
    add("--task", choices=tuple(TASKS), default=TASK, help="kind of document and question")
    add("--seed", type=int, default=0, help="of the document")
    add("--document-tokens", type=int, default=1000, help="at least")
    add("--canvas", type=int, help="tokens of the answer; default: what the task's may take")
    add("server_options", nargs="*", help="after --: more options for vllm serve")
    options = parser.parse_args()
    options.canvas = options.canvas or canvas_of(options.task)
    signal.signal(signal.SIGTERM, end_on_signal)
    with tempfile.TemporaryDirectory(prefix="vllm-sparsed-") as folder:
        log = Path(folder) / "server.log"
        try:
            chosen = server_options(options)
            with served(options.model, chosen, log, name=NAME, say=tell) as address:
                right = ask_all(address, options)
        except ServerError as error:
            print(error, file=sys.stderr)
            return 1
        except APIError as error:
            print(f"{log_tail(log)}\n{error} The end of its log is above.", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted; the server has been stopped.", file=sys.stderr)
            return 130
    print("The server has been stopped.")
    return 0 if right else 1


def tell(line: str) -> None:
    """Say at once what the server does."""
    print(line, flush=True)


def end_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave through the with statements, so that the server is stopped."""
    sys.exit(128 + number)


def server_options(options: argparse.Namespace) -> list[str]:
    """Options for `vllm serve`; the user's come last, so they win."""
    import torch

    tokens = options.document_tokens
    # Beside the document: the question, what the chat template adds, and a line too many.
    chosen = ["--attention-backend", "sparsed"]
    chosen += ["--max-model-len", str(tokens + tokens // 8 + 128 + options.canvas)]
    if Path(options.model).is_dir() and not torch.cuda.is_available():
        # Any CPU is fast at float32, few are at bfloat16.
        chosen += ["--dtype", "float32"]
    return [*chosen, *options.server_options]


def ask_all(address: str, options: argparse.Namespace) -> bool:
    """Ask with all settings; return whether all answers are right."""

    @lru_cache(maxsize=100_000)
    def count(text: str) -> int:
        body = {"model": NAME, "prompt": text, "add_special_tokens": False}
        return int(json.loads(fetch(f"{address}/tokenize", body))["count"])

    document = long_document(
        options.task, options.seed, options.document_tokens, count, options.canvas
    )
    (question,) = document.questions
    show_document(document, count(document.text))
    prompt = document.prompt(question)
    # What a process does for the first time is slow, and is no part of the comparison.
    warm_up = {
        "diffusion_steps": WARM_UP_STEPS,
        "diffusion_block_length": options.canvas,
        "sparsed_skip": 0.0,
        "sparsed_dense_if_faster": False,
    }
    ask(address, prompt, options, warm_up, shown=False)
    answers = {}
    for name, settings in SETTINGS.items():
        print(f"\n{name.capitalize()}:", flush=True)
        answers[name] = ask(address, prompt, options, settings)
        print(verdict(answers[name].text, question.answer), flush=True)
    show_figures(answers)
    return all(is_correct(answer.text, question.answer) for answer in answers.values())


def long_document(task: str, seed: int, tokens: int, count: CountTokens, canvas: int) -> Document:
    """A document of at least so many tokens, with one question, that no training has seen.

    The answer and its end fit the canvas.
    """
    room = tokens + canvas
    while True:
        document = make_document(task, "test", seed, Limits(room, count, canvas=canvas))
        missing = tokens - count(document.text)
        if missing <= 0:
            return document
        room += missing


def show_document(document: Document, tokens: int) -> None:
    """Print its first lines, the question and the answer expected."""
    (question,) = document.questions
    print(f"\nA document of {tokens:,} tokens in {len(document.lines)} lines:")
    for line in document.lines[:SHOWN_LINES]:
        print(f"  | {line.rstrip()}")
    print(f"  | ... and {len(document.lines[SHOWN_LINES:])} more lines")
    print(f"Question: {question.text}", flush=True)


def ask(
    address: str,
    prompt: str,
    options: argparse.Namespace,
    settings: dict[str, Any],
    shown: bool = True,
) -> Answer:
    """Send the prompt as a chat turn, and print each piece of the answer as it arrives.

    What arrives is the beginning of the answer, as far as it is decided.
    """
    client = OpenAI(base_url=f"{address}/v1", api_key="unused")
    before = Counters.parse(fetch(f"{address}/metrics"))
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=options.canvas,
        temperature=0,
        stream=True,
        extra_body={
            "vllm_xargs": {"diffusion_block_length": BLOCK_LENGTH, **settings},
        },
    )
    text, first = "", None
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            text += piece
            if first is None:
                first = time.perf_counter() - start
            if shown:
                print(
                    indented(piece) if text != piece else f"  {indented(piece)}", end="", flush=True
                )
    seconds = time.perf_counter() - start
    if shown:
        print()
    return Answer(
        text, first or seconds, seconds, Counters.parse(fetch(f"{address}/metrics")) - before
    )


def indented(text: str) -> str:
    """With two spaces after each line break."""
    return text.replace("\n", "\n  ")


def verdict(answer: str, expected: str) -> str:
    """Say whether the answer is the expected one."""
    if is_correct(answer, expected):
        return "  -> right"
    return f"  -> WRONG: {answer.strip()!r} in place of {expected!r}"


def show_figures(answers: dict[str, Answer]) -> None:
    """Print a row for each setting, and what to make of the times."""
    print(
        f"\n{'setting':14}{'passes':>8}{'tokens per pass':>17}{'first text':>12}{'time':>9}"
        f"{'sparse passes':>15}{'density there':>15}"
    )
    for name, answer in answers.items():
        counted = answer.counted
        density = f"{counted.density:.1%}" if counted.sparse else "-"
        print(
            f"{name:14}{counted.passes:>8.0f}{counted.tokens_per_pass:>17.2f}"
            f"{answer.first:>10.1f} s{answer.seconds:>7.1f} s{counted.sparse:>15.0f}{density:>15}"
        )
    ratio = answers["exact"].seconds / answers["fast"].seconds
    print(
        f"Deciding all that the model is sure of took {ratio:.1f} times less time. Sparse\n"
        "attention gains nothing at so few tokens, on a CPU above all: docs/performance.md has\n"
        "its times for long texts on GPUs.\n"
    )


def fetch(url: str, body: dict[str, Any] | None = None) -> str:
    """GET, or POST where there is a body; returns the text."""
    request = urllib.request.Request(url)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        text: str = response.read().decode()
    return text


if __name__ == "__main__":
    sys.exit(main())
