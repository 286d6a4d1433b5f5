"""The three tables of the whole-request benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.engine.breakdown import PARTS, StepProfile
from benchmarks.measuring.rows import RowFile
from benchmarks.measuring.timing import Quantiles
from benchmarks.requests.plain_steps import Measurement
from benchmarks.requests.step_times import KINDS, StepTimes

_REQUEST: Final = (
    *("model", "provider", "quantization", "dtype", "length", "canvas"),
    *("skip", "select", "block_size"),
)
STEPS_FILE: Final = "request_steps.csv"
TOTALS_FILE: Final = "request_totals.csv"
BREAKDOWN_FILE: Final = "request_breakdown.csv"

OURS_DENSE: Final = "ours, dense"
OURS_SPARSE: Final = "ours, sparse"
PLAIN_DENSE: Final = "PyTorch, SDPA"
PLAIN_SPARSE: Final = "PyTorch, FlexAttention SparseD"
PROVIDERS: Final = (OURS_DENSE, OURS_SPARSE, PLAIN_DENSE, PLAIN_SPARSE)
BY_MEASURED: Final = {
    "ours": (OURS_DENSE, OURS_SPARSE),
    "plain": (PLAIN_DENSE, PLAIN_SPARSE),
}
"""What is measured together, in one process: the dense provider, then the sparse one."""


class RequestTables:
    """Rows of steps, of whole requests and of where a step's time goes."""

    def __init__(self, folder: Path, append: bool = False) -> None:
        """Open the files of a folder; what they hold is kept only with `append`.

        Raises:
            ValueError: the files to append to have other columns.
        """
        figures = ("kind", "ms_p20", "ms", "ms_p80", "measured", "density", "peak_gib", "note")
        whole = ("total_steps", "seconds", "extrapolated", "measured", "density", "note")
        steps, totals = (*_REQUEST, *figures), (*_REQUEST, *whole)
        parts = (*_REQUEST, "kind", "part", "ms", "share")
        self._steps = RowFile(folder / STEPS_FILE, steps, append)
        self._totals = RowFile(folder / TOTALS_FILE, totals, append)
        self._parts = RowFile(folder / BREAKDOWN_FILE, parts, append)

    def holds(self, request: dict[str, object], extrapolated: bool = True) -> bool:
        """Whether the time of such a request is there, from this machine and these versions."""
        return self._totals.holds("seconds", extrapolated=extrapolated, **request)

    def failed(self, request: dict[str, object], note: str) -> None:
        """A request that was not measured, and why."""
        self._steps.add({**request, "note": note})
        print(f"{name_of(request)}: {note}", flush=True)

    def add(
        self,
        request: dict[str, object],
        times: StepTimes,
        what: Measurement,
        totals: list[int],
        sparse: bool,
        peak_gib: float,
    ) -> None:
        """The steps of a request, and what requests of more steps would take."""
        density = times.density if sparse else 1.0
        for kind in KINDS if sparse else ("dense",):
            ms = [1e3 * s for s in times.seconds[kind]]
            q = Quantiles.of(ms)
            self._steps.add(
                {
                    **request,
                    "kind": kind,
                    "ms_p20": q.p20,
                    "ms": q.p50,
                    "ms_p80": q.p80,
                    "measured": len(ms),
                    "density": density,
                    "peak_gib": peak_gib,
                    "note": times.note,
                }
            )
            print(f"{name_of(request)}: {kind} step {q.p50:.2f} ms ({len(ms)} measured)")
        if sparse and density is not None:
            print(f"{name_of(request)}: {density:.4f} of the blocks kept")
        for total_steps in totals:
            seconds = times.request_seconds(total_steps, what.settings.skip, sparse)
            row = {
                **request,
                "total_steps": total_steps,
                "seconds": seconds,
                "extrapolated": True,
                "measured": times.measured if sparse else f"{len(times.seconds['dense'])} dense",
                "density": density,
                "note": times.note,
            }
            self._totals.add(row)
            print(
                f"{name_of(request)}: T = {total_steps}: {seconds:.2f} s, extrapolated from "
                f"{row['measured']} steps",
                flush=True,
            )

    def add_whole(self, request: dict[str, object], total_steps: int, seconds: float) -> None:
        """A request that was run to its end."""
        row = {"total_steps": total_steps, "seconds": seconds, "extrapolated": False}
        self._totals.add({**request, **row, "measured": f"all {total_steps} steps"})
        print(f"{name_of(request)}: T = {total_steps}: {seconds:.2f} s, run to the end", flush=True)

    def add_breakdown(
        self, request: dict[str, object], profiles: Mapping[str, StepProfile]
    ) -> None:
        """Where the time of a step of each kind goes."""
        for kind, profile in profiles.items():
            total = sum(profile.milliseconds.values())
            for part in PARTS:
                ms = profile.milliseconds[part]
                row = {**request, "kind": kind, "part": part, "ms": ms, "share": ms / total}
                self._parts.add(row)
            shares = ", ".join(
                f"{part} {profile.milliseconds[part]:.2f} ms "
                f"({profile.milliseconds[part] / total:.1%})"
                for part in PARTS
            )
            print(f"{name_of(request)}: {kind} step: {shares}", flush=True)
            for ms, calls, kernel in profile.longest:
                print(f"    {ms:9.3f} ms  x{calls:<5} {kernel[:90]}")


def describe(
    model: str, provider: str, dtype: str, quantization: str, what: Measurement
) -> dict[str, object]:
    """The columns that say which request a row is about."""
    return {
        "model": model,
        "provider": provider,
        "quantization": quantization,
        "dtype": dtype,
        "length": what.length,
        "canvas": what.canvas,
        "skip": what.settings.skip,
        "select": what.settings.select,
        "block_size": what.settings.block_size,
    }


def name_of(request: dict[str, object]) -> str:
    """The same in a few words."""
    quantization = "" if request["quantization"] == "none" else f", {request['quantization']}"
    return f"{request['model']} {request['length']} {request['provider']}{quantization}"
