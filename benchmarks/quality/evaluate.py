"""Evaluate a checkpoint served by vLLM on the tasks of this folder, dense and with SparseD.

    python -m benchmarks.quality.evaluate small-model/model --lengths 1024 4096 --output quality

Each question is a chat turn after its document. The output folder gets `quality.csv`, a row per
task, length and setting, and `quality.png` where matplotlib is there. Documents are of the test
split, which no training uses.
"""

import argparse
import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from benchmarks.quality.tasks import TASKS, Limits, is_correct, make_document

CONFIDENCE_Z: Final = 1.959964  # standard deviations of a two-sided interval of 95%


@dataclass(frozen=True, slots=True)
class Setting:
    """SparseD's parameters; None in each: dense attention."""

    select: float | None = None
    skip: float | None = None
    block_size: int | None = None

    @property
    def is_dense(self) -> bool:
        return self.select is None

    @property
    def name(self) -> str:
        if self.is_dense:
            return "dense"
        return f"select {self.select:g}, skip {self.skip:g}, block {self.block_size}"

    def extra_args(self) -> dict[str, Any]:
        if self.is_dense:
            return {"sparsed_enabled": False}
        return {f"sparsed_{name}": value for name, value in asdict(self).items()}

    def first_sparse_step(self, steps: int) -> int:
        """Of the `steps` asked for, the first with sparse attention; `steps` if there is none."""
        if self.skip is None:
            return steps
        return min(steps, int(steps * self.skip) + 2)


@dataclass(frozen=True, slots=True)
class Case:
    """One question to ask: prompt tokens and the answer expected."""

    task: str
    length: int
    prompt: list[int]
    answer: str


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back.

    Attributes:
        decided: denoising step in which each token of the answer was decided.
        steps: those taken; a request ends early once nothing visible is left to decide.
    """

    text: str
    decided: list[int]
    steps: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the CSV; low and high bound the exact match at 95% confidence (Wilson).

    Attributes:
        sparse_tokens: share of the answers' tokens decided in steps with sparse attention.
    """

    task: str
    length: int
    setting: str
    select: float | None
    skip: float | None
    block_size: int | None
    documents: int
    correct: int
    exact_match: float
    low: float
    high: float
    steps: float
    sparse_tokens: float


def wilson_interval(correct: int, asked: int) -> tuple[float, float]:
    """Bounds of a share at 95% confidence (E. B. Wilson, 1927).

    Raises:
        ValueError: nothing was asked.
    """
    if asked < 1:
        raise ValueError("asked must be at least 1")
    share, z = correct / asked, CONFIDENCE_Z
    middle = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def make_cases(
    tokenizer: Any, tasks: Iterable[str], lengths: Iterable[int], documents: int, canvas: int
) -> list[Case]:
    """Questions whose prompt and canvas fit each length.

    Args:
        tokenizer: of transformers, with a chat template.
        tasks: names of `TASKS`.
        lengths: tokens of prompt and canvas together.
        documents: per task and length.
        canvas: tokens of the answer.
    """

    @lru_cache(maxsize=200_000)
    def count(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False))

    overhead = len(chat_prompt(tokenizer, "")) + canvas
    cases = []
    for task, length, seed in itertools.product(tasks, lengths, range(documents)):
        room = length
        while True:
            document = make_document(task, "test", seed, Limits(room, count, overhead))
            question = document.questions[0]
            prompt = chat_prompt(tokenizer, document.prompt(question))
            excess = len(prompt) + canvas - length
            if excess <= 0:
                break
            # Tokens may join differently where lines do.
            room -= excess
        cases.append(Case(task, length, prompt, question.answer))
    return cases


def chat_prompt(tokenizer: Any, content: str) -> list[int]:
    """Tokens of a user's first message, up to where the answer begins."""
    message = [{"role": "user", "content": content}]
    ids: list[int] = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return ids


def observe(worker: Any) -> dict[str, tuple[int, list[int], int]]:
    """In a worker: steps done, canvas and mask token of every request that runs."""
    return {
        request_id: (
            state.step,
            state.tokens[state.plan.prompt_len :].tolist(),
            state.mask_token_id,
        )
        for request_id, state in worker.model_runner.requests.items()
    }


def answer_cases(
    llm: Any, cases: Sequence[Case], setting: Setting, canvas: int, steps: int
) -> list[Answered]:
    """Ask all questions under one setting, and watch when each token is decided."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=canvas,
        extra_args={
            "diffusion_steps": steps,
            "diffusion_block_length": canvas,
            **setting.extra_args(),
        },
    )
    engine = llm.llm_engine
    for number, case in enumerate(cases):
        engine.add_request(f"case{number}", {"prompt_token_ids": case.prompt}, params)
    decided: dict[str, dict[int, int]] = {f"case{number}": {} for number in range(len(cases))}
    taken = dict.fromkeys(decided, 0)
    answers: dict[str, tuple[str, int]] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        for request_id, (done, tokens, mask) in llm.collective_rpc(observe)[0].items():
            # vLLM may add a suffix of its own.
            name = request_id.split("-")[0]
            taken[name] = done
            for position, token in enumerate(tokens):
                if token != mask:
                    decided[name].setdefault(position, done - 1)
        for output in outputs:
            if output.finished:
                completion = output.outputs[0]
                answers[output.request_id] = (completion.text, len(completion.token_ids))
    answered = []
    for name, places in decided.items():
        text, length = answers[name]
        last = max(0, taken[name] - 1)
        at = [places.get(position, last) for position in range(length)]
        answered.append(Answered(text, at, taken[name]))
    return answered


def rows_of(
    setting: Setting, cases: Sequence[Case], answered: Sequence[Answered], steps: int
) -> list[Row]:
    """One row per task and length; `steps` are those asked for."""
    first_sparse = setting.first_sparse_step(steps)
    groups: dict[tuple[str, int], list[tuple[Case, Answered]]] = {}
    for case, answer in zip(cases, answered, strict=True):
        groups.setdefault((case.task, case.length), []).append((case, answer))
    rows = []
    for (task, length), pairs in groups.items():
        correct = sum(is_correct(answer.text, case.answer) for case, answer in pairs)
        low, high = wilson_interval(correct, len(pairs))
        tokens = sum(len(answer.decided) for _, answer in pairs)
        sparse = sum(step >= first_sparse for _, answer in pairs for step in answer.decided)
        rows.append(
            Row(
                task=task,
                length=length,
                setting=setting.name,
                **asdict(setting),
                documents=len(pairs),
                correct=correct,
                exact_match=round(correct / len(pairs), 4),
                low=round(low, 4),
                high=round(high, 4),
                steps=round(sum(answer.steps for _, answer in pairs) / len(pairs), 2),
                sparse_tokens=round(sparse / tokens, 4) if tokens else 0.0,
            )
        )
    return rows


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def plot(path: Path, rows: Sequence[Row]) -> bool:
    """Exact match over length, a panel per task; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    tasks = list(dict.fromkeys(row.task for row in rows))
    settings = list(dict.fromkeys(row.setting for row in rows))
    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(3.2 * len(tasks), 3.4), sharey=True, squeeze=False
    )
    for axis, task in zip(axes[0], tasks, strict=True):
        for setting in settings:
            shown = [row for row in rows if row.task == task and row.setting == setting]
            middle = [row.exact_match for row in shown]
            errors = [
                [row.exact_match - row.low for row in shown],
                [row.high - row.exact_match for row in shown],
            ]
            lengths = [row.length for row in shown]
            axis.errorbar(lengths, middle, yerr=errors, label=setting, marker="o", capsize=2)
        axis.set(title=task, xlabel="tokens", xscale="log", ylim=(-0.02, 1.02))
    axes[0][0].set_ylabel("exact match")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True


def evaluate(
    llm: Any,
    cases: Sequence[Case],
    settings: Sequence[Setting],
    canvas: int,
    steps: int,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """All settings, one after another, on the same questions."""
    rows: list[Row] = []
    for setting in settings:
        began = time.perf_counter()
        answered = answer_cases(llm, cases, setting, canvas, steps)
        fresh = rows_of(setting, cases, answered, steps)
        report(f"{setting.name} ({time.perf_counter() - began:.1f} s)")
        for row in fresh:
            report(
                f"  {row.task:18} {row.length:6} tokens: {row.exact_match:6.1%} "
                f"[{row.low:.1%}, {row.high:.1%}] of {row.documents}, "
                f"{row.sparse_tokens:.0%} of the tokens in sparse steps"
            )
        rows += fresh
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder or name of a checkpoint with a chat template")
    add("--output", type=Path, default=Path("quality"), help="folder of the results")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="prompt and canvas")
    add("--documents", type=int, default=200, help="per task and length")
    add("--select", type=float, nargs="*", default=[0.3], help="none given: dense only")
    add("--skip", type=float, nargs="+", default=[0.2])
    add("--block-size", type=int, nargs="+", default=[128])
    add("--canvas", type=int, default=32, help="tokens of an answer")
    add("--steps", type=int, default=32, help="denoising steps of an answer")
    add("--batch-tokens", type=int, help="of a forward pass; default: four of the longest")
    add("--dtype", default="auto")
    add("--gpu-memory-utilization", type=float, default=0.5)
    options = parser.parse_args()

    # The engine core in this process: its requests can then be watched step by step.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    longest = max(options.lengths)
    sparsed: dict[str, Any] = {"max_canvas": options.canvas}
    if options.select:
        # The server's values are the most that a request may ask for.
        sparsed |= {"select": max(options.select), "block_size": min(options.block_size)}
    llm = LLM(
        options.model,
        attention_backend="sparsed",
        dtype=options.dtype,
        max_model_len=longest,
        max_num_batched_tokens=options.batch_tokens or 4 * longest,
        gpu_memory_utilization=options.gpu_memory_utilization,
        additional_config={"sparsed": sparsed},
    )
    grid = itertools.product(options.select, options.skip, options.block_size)
    settings = [Setting(), *(Setting(*values) for values in grid)]
    cases = make_cases(
        llm.get_tokenizer(), options.tasks, options.lengths, options.documents, options.canvas
    )
    rows = evaluate(llm, cases, settings, options.canvas, options.steps)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "quality.csv", rows)
    drawn = plot(options.output / "quality.png", rows)
    print(
        f"written: {options.output / 'quality.csv'}" + ("" if drawn else "; no matplotlib, no plot")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
