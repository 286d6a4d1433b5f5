"""Whole requests at the shape of LLaDA-8B and Dream-7B: ours, and plain PyTorch loops.

    python -m benchmarks.requests.run                      all lengths of both models, longest first
    python -m benchmarks.requests.run --models llada-8b --lengths 65536 --measure ours --resume
    python -m benchmarks.requests.run --small              tiny models, for a CPU

Weights are random. A few steps of each kind (dense; the last dense one, which also builds the
patterns; sparse) are measured after a check against a plain reference; the time of a request of T
steps is the medians times how often each kind comes, and every row says that it is extrapolated
and from how many steps. `--whole` also runs requests of the first T to their end. Ours is vLLM in
this process: its dense steps stand for the same engine without SparseD. Each model and kind of loop
runs in a process of its own, so that one that fails or does not fit leaves the others alone. Rows
are written as soon as they are measured; `--resume` keeps the rows of a folder and measures what
they lack.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.engine.denoising_engine import (
    EngineOptions,
    has_weights,
    model_path,
    runner_of,
    start_engine,
    stop_engine,
)
from benchmarks.measuring.deadline import Deadline
from benchmarks.measuring.environment import headline
from benchmarks.measuring.memory import peak_gib, start_peak
from benchmarks.measuring.rows import reason
from benchmarks.reference.models import Dimensions, ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSettings
from benchmarks.requests import tables
from benchmarks.requests.options import MORE_STEPS, UNQUANTIZED, parse
from benchmarks.requests.plain_model import PlainModel
from benchmarks.requests.plain_steps import Measurement, PlainRequest, check_plain
from benchmarks.requests.random_model import random_weights, read_config, register_loader
from benchmarks.requests.served_steps import (
    check_served,
    measure_served,
    profile_served,
    whole_request,
)
from benchmarks.requests.tables import RequestTables

GRACE: Final = 60.0
"""Seconds that a process may run past the deadline, to finish the request it measures."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one process measures: a model's plain loops, or our engine with one quantization."""

    model: str
    measured: str
    quantization: str

    def __str__(self) -> str:
        quantized = "" if self.quantization == UNQUANTIZED else f", {self.quantization}"
        return f"{self.model}, {self.measured}{quantized}"

    @property
    def arguments(self) -> list[str]:
        return [
            *("--models", self.model, "--measure", self.measured),
            *("--quantizations", self.quantization),
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a process failed."""
    options = parse(arguments)
    if options.in_this_process:
        measure_one(options)
        return 0
    given = list(sys.argv[1:] if arguments is None else arguments)
    deadline = Deadline(options.minutes)
    print(headline(), flush=True)
    table = RequestTables(options.output, options.resume)
    failures = 0
    for job in jobs(options):
        if options.resume and not any(missing(options, job, table)):
            print(f"{job}: all there", flush=True)
            continue
        if deadline.passed:
            print(f"{job}: {deadline.note}", flush=True)
            for request in missing(options, job, table):
                table.failed(request, deadline.note)
            continue
        command = [sys.executable, "-m", "benchmarks.requests.run", *given, *job.arguments]
        command += ["--in-this-process"]
        if options.minutes is not None:
            command += ["--minutes", f"{deadline.seconds_left / 60:.3f}"]
        limit = min(options.time_limit, deadline.seconds_left + GRACE)
        try:
            failures += subprocess.run(command, timeout=limit).returncode != 0
        except subprocess.TimeoutExpired:
            print(f"{job}: not done after {limit:.0f} s", flush=True)
            failures += 1
    print(f"rows in {options.output}")
    return 1 if failures else 0


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """In order of importance: for each model ours, the plain loops, ours quantized."""
    for model in options.models:
        quantized = [q for q in options.quantizations if q != UNQUANTIZED]
        if "ours" in options.measure and UNQUANTIZED in options.quantizations:
            yield Job(model, "ours", UNQUANTIZED)
        if "plain" in options.measure:
            yield Job(model, "plain", UNQUANTIZED)
        if "ours" in options.measure:
            yield from (Job(model, "ours", quantization) for quantization in quantized)


def missing(
    options: argparse.Namespace, job: Job, table: RequestTables
) -> Iterator[dict[str, object]]:
    """The requests of a job whose times the tables lack."""
    for what in measurements(options, job.measured):
        for provider in tables.BY_MEASURED[job.measured]:
            request = describe(options, job, provider, what)
            if not table.holds(request):
                yield request
    if job.measured == "ours":
        for what in measurements(options, job.measured, whole=True):
            for provider in tables.BY_MEASURED[job.measured]:
                request = describe(options, job, provider, what)
                if not table.holds(request, extrapolated=False):
                    yield request


def measure_one(options: argparse.Namespace) -> None:
    """Measure one job, its lengths in the order given."""
    table, deadline = RequestTables(options.output, append=True), Deadline(options.minutes)
    (job,) = jobs(options)
    if job.measured == "plain":
        measure_plain_loops(options, job, table, deadline)
    else:
        measure_ours(options, job, table, deadline)


def measurements(
    options: argparse.Namespace, measured: str, whole: bool = False
) -> list[Measurement]:
    """One for each length, in the order given."""
    settings = SparseSettings(options.skip, options.select, options.block_size)
    lengths = options.plain_lengths if measured == "plain" else options.lengths
    found = []
    for length in options.whole if whole else lengths:
        few = measured == "plain" and length >= options.few_steps_from
        more = measured == "ours" and length <= options.more_steps_up_to
        times = MORE_STEPS if more else 1
        found.append(
            Measurement(
                length,
                options.canvas,
                settings,
                1 if few else times * options.dense_steps,
                1 if few else times * options.sparse_steps,
                options.pattern_layers if few else 0,
            )
        )
    return found


def measure_plain_loops(
    options: argparse.Namespace, job: Job, table: RequestTables, deadline: Deadline
) -> None:
    """Dense and sparse plain loops of one model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = read_config(model_path(job.model))
    weights = random_weights(config, getattr(torch, options.dtype), device)
    model = PlainModel(Dimensions.from_config(config), weights)
    settings = SparseSettings(options.skip, options.select, options.block_size)
    print(f"{job}: relative error of one layer's logits {check_plain(model, settings):.1e}")
    for what in measurements(options, job.measured):
        dense, sparse = (
            describe(options, job, provider, what) for provider in tables.BY_MEASURED["plain"]
        )
        if options.resume and table.holds(dense) and table.holds(sparse):
            continue
        if deadline.passed:
            for request in (dense, sparse):
                table.failed(request, deadline.note)
            continue
        plain = PlainRequest(model, what)
        for request, measure in ((dense, plain.dense), (sparse, plain.sparse)):
            start_peak()
            try:
                times = measure()
            except Exception as problem:
                table.failed(request, reason(problem))
                continue
            table.add(request, times, what, options.totals, request is sparse, peak_gib())


def measure_ours(
    options: argparse.Namespace, job: Job, table: RequestTables, deadline: Deadline
) -> None:
    """Our engine, dense and sparse steps of one request of each length."""
    lengths = [*options.lengths, *options.whole]
    engine = EngineOptions(
        model=job.model,
        max_length=max(lengths),
        canvas=options.canvas,
        backend=options.backend,
        skip=options.skip,
        select=options.select,
        block_size=options.block_size,
        dtype=options.dtype,
        quantization=None if job.quantization == UNQUANTIZED else job.quantization,
        load_format="auto" if has_weights(job.model) else register_loader(),
        more={"gpu_memory_utilization": options.gpu_memory_utilization},
    )
    llm = start_engine(engine)
    try:
        print(f"{job}: relative error of the served logits {check(llm, job):.1e}", flush=True)
        for what in measurements(options, job.measured):
            dense, sparse = (
                describe(options, job, provider, what) for provider in tables.BY_MEASURED["ours"]
            )
            if options.resume and table.holds(dense) and table.holds(sparse):
                continue
            if deadline.passed:
                table.failed(sparse, deadline.note)
                continue
            start_peak()
            try:
                times = measure_served(llm, what)
                peak = peak_gib()
                for request in (dense, sparse):
                    table.add(request, times, what, options.totals, request is sparse, peak)
                if not options.no_profile:
                    table.add_breakdown(sparse, profile_served(llm, what, times))
            except Exception as problem:
                table.failed(sparse, reason(problem))
        measure_whole(llm, options, job, table, deadline)
    finally:
        stop_engine(llm)


def measure_whole(
    llm: Any, options: argparse.Namespace, job: Job, table: RequestTables, deadline: Deadline
) -> None:
    """Run the requests of --whole to their end, dense and sparse."""
    for what in measurements(options, job.measured, whole=True):
        for provider in tables.BY_MEASURED["ours"]:
            request = describe(options, job, provider, what)
            if options.resume and table.holds(request, extrapolated=False):
                continue
            if deadline.passed:
                table.failed(request, deadline.note)
                continue
            total = options.totals[0]
            sparse = provider == tables.OURS_SPARSE
            try:
                table.add_whole(request, total, whole_request(llm, what, total, sparse))
            except Exception as problem:
                table.failed(request, reason(problem))


def describe(
    options: argparse.Namespace, job: Job, provider: str, what: Measurement
) -> dict[str, object]:
    """The columns that say which request a row is about."""
    return tables.describe(job.model, provider, options.dtype, job.quantization, what)


def check(llm: Any, job: Job) -> float:
    """Compare the engine's logits with the plain reference; returns how far they are apart."""
    path, runner = model_path(job.model), runner_of(llm)
    config, dtype = read_config(path), runner.model_config.dtype
    if has_weights(job.model):
        reference = ReferenceModel.load(path, dtype, runner.device)
    else:
        weights = random_weights(config, dtype, runner.device)
        reference = ReferenceModel(Dimensions.from_config(config), weights)
    error = check_served(llm, config, reference, quantized=job.quantization != UNQUANTIZED)
    if torch.cuda.is_available():
        # The reference's weights: the engine's own allocations should find room.
        del reference
        torch.cuda.empty_cache()
    return error


if __name__ == "__main__":
    sys.exit(main())
