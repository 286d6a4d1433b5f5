"""Measures the steps of a request in vLLM, after checking the model it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.engine.breakdown import StepProfile, StepProfiler, breakdown
from benchmarks.engine.denoising_engine import run_request, runner_of
from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.served import dense_logits
from benchmarks.requests.plain_steps import Measurement, WrongLogitsError, relative_error
from benchmarks.requests.step_times import StepTimes, steps_by_kind, steps_to_measure

CHECKED_LENGTH: Final = 500
CHECKED_ROWS: Final = 64
ALLOWED_ERROR: Final = {torch.bfloat16: 0.1, torch.float16: 0.03, torch.float32: 1e-3}
"""Largest error of all layers' logits, relative to their norm, that passes the check."""


@dataclass(frozen=True)
class ServedSteps:
    """What one request showed.

    Attributes:
        times: dense, building and sparse steps.
        profiles: by kind of step.
        peak_gib: largest memory in use on the device; 0 on a CPU.
    """

    times: StepTimes
    profiles: dict[str, StepProfile]
    peak_gib: float


def check_served(llm: Any, config: dict[str, Any], reference: ReferenceModel) -> float:
    """Compare a dense forward pass in vLLM with the plain reference on the same weights.

    Args:
        llm: the engine.
        config: config.json of its model.
        reference: the model, on any device.

    Returns:
        The relative error of the logits.

    Raises:
        WrongLogitsError: it is too large.
    """
    runner = runner_of(llm)
    length = min(CHECKED_LENGTH, runner.settings.max_model_len)
    tokens = [10 + i % (config["vocab_size"] - 10) for i in range(length)]
    rows = list(range(0, length, max(1, length // CHECKED_ROWS)))
    served = llm.collective_rpc(dense_logits, args=(tokens, rows))[0]
    dtype = runner.model_config.dtype
    with torch.no_grad():
        device = reference.weights["model.norm.weight"].device
        expected = reference.logits(torch.tensor(tokens, device=device))[0][rows]
    error = relative_error(served[:, : expected.shape[1]], expected.cpu())
    if not error <= ALLOWED_ERROR[dtype]:
        raise WrongLogitsError(f"relative error of the served logits {error:.2e}")
    return error


def measure_served(llm: Any, what: Measurement, profile: bool) -> ServedSteps:
    """Time the steps of one request that is sparse after its dense steps, then abort it.

    One dense and one sparse step more than asked for warm up; with `profile` one of each more runs
    under the profiler, and its parts are set against the median of the timed ones.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    extra = 1 if profile else 0
    skip = what.settings.skip
    wanted = (1 + what.dense_steps + extra, 1 + what.sparse_steps + extra)
    total = steps_to_measure(*wanted, skip, most=what.canvas)
    building = steps_by_kind(total, skip, sparse=True)["dense"]
    sparse_from = building + 2
    max_steps = sparse_from + what.sparse_steps + extra
    profiled = {"dense": building - 1, "sparse": max_steps - 1} if profile else {}
    profiler = StepProfiler(list(profiled.values()))
    densities: list[float | None] = []

    @contextlib.contextmanager
    def on_step(step: int) -> Iterator[None]:
        with profiler.on_step(step):
            yield
        if step == building:
            densities.append(_density(runner_of(llm)))

    seconds = run_request(
        llm.llm_engine,
        length=what.length,
        canvas=what.canvas,
        steps=total,
        max_steps=max_steps,
        on_step=on_step,
        extra_args={
            "sparsed_skip": what.settings.skip,
            "sparsed_select": what.settings.select,
            "sparsed_block_size": what.settings.block_size,
        },
    ).seconds
    times = StepTimes(density=densities[0])
    times.add("dense", seconds[1 : building - extra])
    times.add("building", [seconds[building]])
    times.add("sparse", seconds[sparse_from : sparse_from + what.sparse_steps])
    profiles = {
        kind: breakdown(profiler.kernels(step), times.median(kind) * 1e3)
        for kind, step in profiled.items()
    }
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return ServedSteps(times, profiles, peak)


def _density(runner: Any) -> float | None:
    """Share of the key blocks kept by the patterns of the one request that runs."""
    (state,) = runner.requests.values()
    if not state.row_slots:
        return None
    (rows,) = state.row_slots
    counts = runner.store.counts[:, rows]
    return float(counts.sum(dtype=torch.int64)) / (counts.numel() * len(rows))
