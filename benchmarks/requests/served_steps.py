"""Measures the steps of a request in vLLM, after checking the model it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from benchmarks.engine.breakdown import StepProfile, StepProfiler, breakdown
from benchmarks.engine.denoising_engine import (
    OnStep,
    RequestRun,
    no_context,
    run_request,
    runner_of,
)
from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.served import dense_logits
from benchmarks.requests.plain_steps import Measurement, WrongLogitsError, relative_error
from benchmarks.requests.step_times import StepTimes, steps_by_kind, steps_to_measure

CHECKED_LENGTH: Final = 500
CHECKED_ROWS: Final = 64
ALLOWED_ERROR: Final = {torch.bfloat16: 0.2, torch.float16: 0.03, torch.float32: 1e-3}
"""Largest error of all layers' logits, relative to their norm, that passes the check.

Both sides round: 32 layers in bfloat16 are 0.09 apart, where one is 0.017.
"""

LONG_STEP: Final = 1.0
"""Seconds of a step beside which nothing that happens once counts."""

ALLOWED_ERROR_QUANTIZED: Final = 1.0
"""The same with quantized weights: unrelated logits are about 1.41 apart. Random layers amplify
what rounding changes: in a simulation of 32 layers bfloat16 comes to 0.06, fp8 to 0.66."""


def check_served(
    llm: Any, config: dict[str, Any], reference: ReferenceModel, quantized: bool = False
) -> float:
    """Compare a dense forward pass in vLLM with the plain reference on the same weights.

    Args:
        llm: the engine.
        config: config.json of its model.
        reference: the model, on any device.
        quantized: whether the engine's weights are.

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
    if not error <= (ALLOWED_ERROR_QUANTIZED if quantized else ALLOWED_ERROR[dtype]):
        raise WrongLogitsError(f"relative error of the served logits {error:.2e}")
    return error


def measure_served(llm: Any, what: Measurement) -> StepTimes:
    """Time the steps of one request that is sparse after its dense steps, then abort it.

    One dense and one sparse step more than asked for warm up.
    """
    skip = what.settings.skip
    total = steps_to_measure(1 + what.dense_steps, 1 + what.sparse_steps, skip, most=what.canvas)
    building = steps_by_kind(total, skip, sparse=True)["dense"]
    densities: list[float | None] = []

    @contextlib.contextmanager
    def on_step(step: int) -> Iterator[None]:
        yield
        if step == building:
            densities.append(_density(runner_of(llm)))

    sparse_from = building + 2
    seconds = _run(llm, what, total, sparse_from + what.sparse_steps, on_step).seconds
    times = StepTimes(density=densities[0])
    # Of more dense steps than were asked for the last ones: those before warm up too.
    times.add("dense", seconds[building - what.dense_steps : building])
    times.add("building", [seconds[building]])
    times.add("sparse", seconds[sparse_from:])
    return times


def whole_request(llm: Any, what: Measurement, total_steps: int, sparse: bool) -> float:
    """Seconds of a request that is run to its end."""
    run = _run(llm, what, total_steps, extra_args={"sparsed_enabled": sparse})
    if len(run.tokens) != what.canvas:
        raise RuntimeError(f"{what.canvas} tokens asked for, {len(run.tokens)} came")
    return sum(run.seconds)


def profile_served(llm: Any, what: Measurement, times: StepTimes) -> dict[str, StepProfile]:
    """Where the time of a step of each kind goes, from a request of its own under the profiler.

    Args:
        llm: the engine.
        what: the request.
        times: of its steps without a profiler.
    """
    skip = what.settings.skip
    # What only a request's first step does, and the first sparse one, is seen in short steps.
    warm_up = 1 if times.median("dense") < LONG_STEP else 0
    total = steps_to_measure(1 + warm_up, 1 + warm_up, skip, most=what.canvas)
    building = steps_by_kind(total, skip, sparse=True)["dense"]
    steps = {"dense": building - 1, "building": building, "sparse": building + 1 + warm_up}
    profiler = StepProfiler(list(steps.values()))
    seconds = _run(llm, what, total, steps["sparse"] + 1, profiler.on_step).seconds
    # The same steps' time: from one request to the next a GPU's clock changes by some percent.
    return {
        kind: breakdown(profiler.kernels(step), seconds[step] * 1e3) for kind, step in steps.items()
    }


def _run(
    llm: Any,
    what: Measurement,
    total_steps: int,
    max_steps: int = 0,
    on_step: OnStep = no_context,
    extra_args: Mapping[str, Any] | None = None,
) -> RequestRun:
    return run_request(
        llm.llm_engine,
        length=what.length,
        canvas=what.canvas,
        steps=total_steps,
        max_steps=max_steps,
        on_step=on_step,
        extra_args={
            "sparsed_skip": what.settings.skip,
            "sparsed_select": what.settings.select,
            "sparsed_block_size": what.settings.block_size,
            **(extra_args or {}),
        },
    )


def _density(runner: Any) -> float | None:
    """Share of the key blocks kept by the patterns of the one request that runs."""
    (state,) = runner.requests.values()
    if not len(state.pattern_rows):
        return None
    (rows,) = state.pattern_rows
    counts = runner.store.counts
    kept = counts[:, torch.as_tensor(rows, dtype=torch.int64, device=counts.device)]
    return float(kept.sum(dtype=torch.int64)) / (kept.numel() * len(rows))
