"""Evaluate a checkpoint served by vLLM on the tasks of this folder: dense, SparseD and others.

    python -m benchmarks.quality.evaluate small-model/model --output quality

Each question is a chat turn after its document; documents are of the test split, which no training
uses. Dense attention and SparseD's defaults are asked at every length; then, at one length, SparseD
with one parameter varied at a time, the baselines and the ablations (`--grid shortcuts`: several
tokens a pass and kept keys and values). The output folder gets the answers, `quality.csv`,
`similarity.csv`, `summary.md` and plots. With `--part 2/5` this process
does its share; `python -m benchmarks.quality.report FOLDER` then makes the rest.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.quality.answering import Asking, answer_cases
from benchmarks.quality.cases import Case, cached_cases
from benchmarks.quality.report import report_folder, setting_line
from benchmarks.quality.results import Record, answers_path, record, summarize, write_rows
from benchmarks.quality.settings import (
    RELEASED,
    Axes,
    Setting,
    compared_settings,
    keeps_keys_and_values,
    main_settings,
    product_settings,
    shortcut_settings,
    sweep_settings,
)
from benchmarks.quality.similarity import FILE_NAME, measure, write_overlaps
from small_model.tasks import TASKS, canvas_of

CUDA_BATCH_TOKENS: Final = 131_072  # of a forward pass: keeps a large GPU busy with a small model


@dataclass(frozen=True, slots=True)
class Unit:
    """Work of one process: one setting at one length."""

    setting: Setting
    length: int
    documents: int

    @property
    def cost(self) -> int:
        return self.length * self.documents

    def cases(self, cases: Iterable[Case]) -> list[Case]:
        return [c for c in cases if c.length == self.length and c.document < self.documents]


def share(units: Sequence[Unit], part: int, parts: int) -> list[Unit]:
    """Those of one of `parts` processes, counted from 1, with about the same cost for each."""
    loads = [0] * parts
    mine = []
    for unit in sorted(units, key=lambda unit: -unit.cost):
        least = loads.index(min(loads))
        loads[least] += unit.cost
        if least == part - 1:
            mine.append(unit)
    return mine


def evaluate(
    llm: Any,
    cases: Sequence[Case],
    units: Iterable[Unit],
    asking: Asking,
    report: Callable[[str], None] = print,
    model: str = "",
) -> list[Record]:
    """All units, one after another; of each, one task after another, so that each has its time."""
    records: list[Record] = []
    for unit in units:
        began = time.perf_counter()
        fresh: list[Record] = []
        asked = unit.cases(cases)
        for task in dict.fromkeys(case.task for case in asked):
            of_task = [case for case in asked if case.task == task]
            answered = answer_cases(llm, of_task, unit.setting, asking)
            fresh += [
                record(unit.setting, case, answer, model)
                for case, answer in zip(of_task, answered, strict=True)
            ]
        records += fresh
        line = setting_line(summarize(fresh)[-1])
        report(f"{line} ({time.perf_counter() - began:.1f} s)")
    return records


def all_units(options: argparse.Namespace, axes: Axes) -> list[Unit]:
    units = [
        Unit(setting, length, options.documents)
        for setting in main_settings(axes)
        for length in options.lengths
    ]
    if options.grid == "main":
        return units
    if options.grid == "shortcuts":
        others = shortcut_settings(axes, keeps_keys_and_values())
    else:
        sweep = sweep_settings(axes) if options.grid == "one" else product_settings(axes)
        others = [*sweep, *compared_settings(axes)]
    documents = options.sweep_documents
    if options.sweep_length in options.lengths:
        # No more than dense attention is asked: each is compared with it.
        documents = min(documents, options.documents)
    else:
        others += main_settings(axes)
    return [*units, *(Unit(s, options.sweep_length, documents) for s in others)]


def start_engine(options: argparse.Namespace, units: Sequence[Unit]) -> Any:
    """An engine whose limits hold every setting."""
    # The engine core in this process: its requests can then be watched step by step.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.platforms import current_platform

    longest = max(options.sweep_length, *(unit.length for unit in units))
    batch_tokens = CUDA_BATCH_TOKENS if current_platform.is_cuda() else 4 * longest
    selects = [unit.setting.select for unit in units if unit.setting.select is not None]
    blocks = [unit.setting.block_size for unit in units if unit.setting.block_size is not None]
    return LLM(
        options.model,
        attention_backend="sparsed",
        dtype=options.dtype,
        max_model_len=longest,
        max_num_batched_tokens=options.batch_tokens or batch_tokens,
        max_num_seqs=512,
        gpu_memory_utilization=options.gpu_memory_utilization,
        # The server's values are the most that a request may ask for.
        additional_config={
            "sparsed": {
                "max_canvas": options.canvas or max(map(canvas_of, options.tasks)),
                "select": max(selects, default=0.3),
                "block_size": min(blocks, default=128),
            }
        },
    )


def part_of(text: str) -> tuple[int, int]:
    """`2/5` as (2, 5)."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} must be like 2/5, the second of five parts")
    return int(part), int(parts)


def setting_of(text: str) -> Setting:
    """SparseD's `0.3,0.2,128`: select, skip and block size."""
    try:
        select, skip, block_size = text.split(",")
        return Setting(float(select), float(skip), int(block_size))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be like 0.3,0.2,128: select, skip and block size"
        ) from None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder or name of a checkpoint with a chat template")
    add("--output", type=Path, default=Path("quality"), help="folder of the results")
    add("--part", type=part_of, default=(1, 1), help="of the work: 2/5 is the second of five parts")
    add("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    add("--lengths", type=int, nargs="+", default=[1024, 4096, 8192], help="prompt and canvas")
    add("--documents", type=int, default=200, help="per task and length, dense and defaults")
    add("--sweep-length", type=int, default=4096, help="of all other settings")
    add("--sweep-documents", type=int, default=100, help="per task, of all other settings")
    grid_help = (
        "main: dense and the defaults; one: also one parameter varied at a time, baselines and "
        "ablations; full: every combination in place of one at a time; shortcuts: also several "
        "tokens a pass and kept keys and values, alone, together and with SparseD"
    )
    add("--grid", choices=("main", "one", "full", "shortcuts"), default="one", help=grid_help)
    default_help = "SELECT,SKIP,BLOCK SIZE asked at every length; default: as released"
    add("--defaults", type=setting_of, nargs="+", default=RELEASED, help=default_help)
    add("--select", type=float, nargs="*", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    add("--skip", type=float, nargs="*", default=[0.0, 0.1, 0.2, 0.3])
    add("--block-size", type=int, nargs="*", default=[32, 64, 128])
    add("--similarity-documents", type=int, default=1, help="per task; 0: leave it out")
    add("--canvas", type=int, help="tokens of every answer; default: what the task's may take")
    add("--alg", help="diffusion_alg of the requests; default: the model's")
    batch_help = f"of a pass; default: {CUDA_BATCH_TOKENS} on CUDA, else four of the longest"
    add("--batch-tokens", type=int, help=batch_help)
    add("--dtype", default="auto")
    add("--gpu-memory-utilization", type=float, default=0.5)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    defaults = tuple(options.defaults)
    axes = Axes(defaults, tuple(options.select), tuple(options.skip), tuple(options.block_size))
    units = all_units(options, axes)
    part, parts = options.part
    asking = Asking(options.canvas, options.alg)
    llm = start_engine(options, units)
    began = time.perf_counter()
    mine = share(units, part, parts)
    records_patterns = part == parts and options.similarity_documents > 0
    lengths = [unit.length for unit in mine] + [options.sweep_length] * records_patterns
    cases = [
        case
        for length in dict.fromkeys(lengths)
        for case in cached_cases(
            options.output / "cases",
            llm.get_tokenizer(),
            options.tasks,
            [length],
            # As many in every process: they share the files.
            max([u.documents for u in units if u.length == length] or [options.sweep_documents]),
            options.canvas,
        )
    ]
    print(f"{len(cases)} documents made or read ({time.perf_counter() - began:.1f} s)")
    records = evaluate(llm, cases, mine, asking, model=Path(options.model).name)
    write_rows(answers_path(options.output, part, parts), records)
    if records_patterns:
        recorded = Unit(defaults[0], options.sweep_length, options.similarity_documents)
        rows = measure(llm, recorded.cases(cases), defaults, asking)
        write_overlaps(options.output / FILE_NAME, rows)
    if parts == 1:
        print(report_folder(options.output))
    else:
        print(f"part {part} of {parts} done; after the last: python -m benchmarks.quality.report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
