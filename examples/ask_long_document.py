"""Serve a diffusion language model over HTTP and ask it about a long document, sparse and dense.

    python examples/ask_long_document.py
    python examples/ask_long_document.py --model GSAI-ML/LLaDA-8B-Instruct --document-tokens 3000

Without arguments the model is this repository's small one. The answer streams in, is checked
against the one that is known, and what it took is read from the server's counters.
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

from examples.local_server import NAME, ServerError, served
from small_model.tasks import (
    TASKS,
    CountTokens,
    Document,
    Limits,
    is_correct,
    make_document,
)

SMALL_MODEL: Final = Path(__file__).resolve().parents[1] / "llada-yardstick-6m"
LOG_TAIL: Final = 40  # lines of the server's log that a failure shows
SHOWN_LINES: Final = 3  # of the document's beginning
WARM_UP_STEPS: Final = 3  # two dense ones, the second with the patterns, and a sparse one


@dataclass(frozen=True, slots=True)
class Counters:
    """What /metrics has counted since the server started; differences are one request's.

    Attributes:
        dense: denoising steps with full attention.
        sparse: denoising steps with a pattern.
        kept: key blocks that the patterns keep.
        candidates: key blocks that they chose from.
    """

    dense: float
    sparse: float
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
            kept=values["vllm:sparsed_kept_blocks_total", None],
            candidates=values["vllm:sparsed_candidate_blocks_total", None],
        )

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            dense=self.dense - earlier.dense,
            sparse=self.sparse - earlier.sparse,
            kept=self.kept - earlier.kept,
            candidates=self.candidates - earlier.candidates,
        )

    @property
    def density(self) -> float:
        """Share of the key blocks that sparse steps attend to; 1 where no pattern was built."""
        return self.kept / self.candidates if self.candidates else 1.0


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer, the seconds until its end, and what the server counted meanwhile."""

    text: str
    seconds: float
    counted: Counters


def main() -> int:
    """Ask; the exit status is 0 where both answers are right."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=str(SMALL_MODEL), help="folder or Hugging Face name")
    add("--task", choices=tuple(TASKS), default="multi_key", help="kind of document and question")
    add("--seed", type=int, default=0, help="of the document")
    add("--document-tokens", type=int, default=4000, help="at least")
    add("--canvas", type=int, default=32, help="tokens of the answer")
    add("--steps", type=int, default=32, help="denoising steps of the answer")
    add("server_options", nargs="*", help="after --: more options for vllm serve")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, end_on_signal)
    with tempfile.TemporaryDirectory(prefix="vllm-sparsed-") as folder:
        log = Path(folder) / "server.log"
        try:
            with served(options.model, server_options(options), log) as address:
                right = ask_twice(address, options)
        except (ServerError, APIError) as error:
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([*tail, f"{error} The end of its log is above."]), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nInterrupted; the server has been stopped.", file=sys.stderr)
            return 130
    print("The server has been stopped.")
    return 0 if right else 1


def end_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave through the with statements, so that the server is stopped."""
    sys.exit(128 + number)


def server_options(options: argparse.Namespace) -> list[str]:
    """Options for `vllm serve`; the user's come last, so they win."""
    import torch

    tokens = options.document_tokens
    # Beside the document: the question, what the chat template adds, and a line too many.
    chosen = ["--max-model-len", str(tokens + tokens // 8 + 128 + options.canvas)]
    if Path(options.model).is_dir() and not torch.cuda.is_available():
        # Any CPU is fast at float32, few are at bfloat16.
        chosen += ["--dtype", "float32"]
    return [*chosen, *options.server_options]


def ask_twice(address: str, options: argparse.Namespace) -> bool:
    """Ask with sparse and with dense attention; return whether both answers are right."""

    @lru_cache(maxsize=100_000)
    def count(text: str) -> int:
        body = {"model": NAME, "prompt": text, "add_special_tokens": False}
        return int(json.loads(fetch(f"{address}/tokenize", body))["count"])

    document = long_document(options.task, options.seed, options.document_tokens, count)
    (question,) = document.questions
    show_document(document, count(document.text))
    prompt = document.prompt(question)
    # What a process does for the first time is slow, and is no part of the comparison.
    # Sparse where asked for, also where dense attention would be faster.
    sparse = {"sparsed_dense_if_faster": False}
    warm_up = {"diffusion_steps": WARM_UP_STEPS, "sparsed_skip": 0.0, **sparse}
    ask(address, prompt, options, warm_up, shown=False)
    answers = {}
    for name, settings in {"sparse": sparse, "dense": {"sparsed_enabled": False}}.items():
        print(f"\nWith {name} attention:", flush=True)
        answers[name] = ask(address, prompt, options, settings)
        print(verdict(answers[name].text, question.answer), flush=True)
    show_figures(answers)
    return all(is_correct(answer.text, question.answer) for answer in answers.values())


def long_document(task: str, seed: int, tokens: int, count: CountTokens) -> Document:
    """A document of at least so many tokens, with one question, that no training has seen."""
    room = tokens
    while True:
        document = make_document(task, "test", seed, Limits(room, count))
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
    print(f"Question: {question.text}\nExpected: {question.answer}", flush=True)


def ask(
    address: str,
    prompt: str,
    options: argparse.Namespace,
    settings: dict[str, Any],
    shown: bool = True,
) -> Answer:
    """Send the prompt as a chat turn, and print each piece of the answer as it arrives."""
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
            # Both requests take all their steps, even if the answer's end is decided early.
            "ignore_eos": True,
            "vllm_xargs": {
                "diffusion_steps": options.steps,
                # One block: in several, the first would be decided in the dense steps alone.
                "diffusion_block_length": options.canvas,
                **settings,
            },
        },
    )
    text = ""
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            text += piece
            if shown:
                print(f"  [{time.perf_counter() - start:6.2f} s] {piece}", flush=True)
    seconds = time.perf_counter() - start
    return Answer(text, seconds, Counters.parse(fetch(f"{address}/metrics")) - before)


def verdict(answer: str, expected: str) -> str:
    """Say whether the answer is the expected one."""
    if is_correct(answer, expected):
        return f"  right: {answer.strip()}"
    return f"  WRONG: {answer.strip()!r} in place of {expected!r}"


def show_figures(answers: dict[str, Answer]) -> None:
    """Print a row for each kind of attention, and what to make of the times."""
    print(f"\n{'attention':10}{'time':>9}{'steps':>7}{'of them sparse':>16}{'density there':>15}")
    for name, answer in answers.items():
        counted = answer.counted
        density = f"{counted.density:.1%}" if counted.sparse else "-"
        print(
            f"{name:10}{answer.seconds:>7.1f} s{counted.dense + counted.sparse:>7.0f}"
            f"{counted.sparse:>16.0f}{density:>15}"
        )
    ratio = answers["sparse"].seconds / answers["dense"].seconds
    print(
        f"Sparse attention took {ratio:.2f} times as long as dense attention here. That is no\n"
        "measure of its speed: at a few thousand tokens, on a CPU above all, both may be equally\n"
        "fast, for building the patterns costs several steps. Times of long texts on GPUs are in\n"
        "benchmarks/NOTES.md.\n"
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
