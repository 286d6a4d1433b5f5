"""Counters of denoising steps and pattern density, on vLLM's /metrics page.

The steps are counted in the engine core and the density in a worker, but /metrics is served by the
front end, and vLLM's statistics have no field for either. The counters therefore live in small
files of one folder per engine start, which the front end's collector reads when it is scraped.
"""

import atexit
import mmap
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS_KEY: Final = "sparsed_counters"
"""Key of `additional_config` under which the counters' folder travels to the other processes."""

_RECORD: Final = struct.Struct("<4d")
"""Dense steps, sparse steps, key blocks kept by built patterns, key blocks they chose from."""


class StepCounters:
    """Four monotonic counters in one file; a folder on another host is no error."""

    def __init__(self, path: Path | None) -> None:
        self._values = [0.0] * 4
        self._map: mmap.mmap | None = None
        if path is not None and path.parent.is_dir():
            path.write_bytes(_RECORD.pack(*self._values))
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _RECORD.size)

    @classmethod
    def for_writing(cls, vllm_config: "VllmConfig", role: str = "scheduler") -> "StepCounters":
        """The counters of this process; one writer per data-parallel rank and role."""
        additional = vllm_config.additional_config
        folder = additional.get(COUNTERS_KEY) if isinstance(additional, dict) else None
        rank = vllm_config.parallel_config.data_parallel_index
        return cls(Path(folder) / f"{role}-{rank}" if folder else None)

    def add(self, dense: int, sparse: int, kept_blocks: int = 0, all_blocks: int = 0) -> None:
        for i, amount in enumerate((dense, sparse, kept_blocks, all_blocks)):
            self._values[i] += amount
        if self._map is not None:
            _RECORD.pack_into(self._map, 0, *self._values)


def make_counters_folder() -> str:
    """A new folder for the counters of one engine, removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="vllm-sparsed-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _StepCollector(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        totals = [0.0] * 4
        for path in sorted(self._folder.glob("*-*")):
            data = path.read_bytes()
            if len(data) == _RECORD.size:
                totals = [a + b for a, b in zip(totals, _RECORD.unpack(data), strict=True)]
        steps = CounterMetricFamily(
            "vllm:denoising_steps",
            "Denoising steps of requests, by the attention they ran with.",
            labels=["attention"],
        )
        steps.add_metric(["dense"], totals[0])
        steps.add_metric(["sparse"], totals[1])
        yield steps
        kept = CounterMetricFamily(
            "vllm:sparsed_kept_blocks", "Key blocks kept by the patterns built so far."
        )
        kept.add_metric([], totals[2])
        yield kept
        chosen = CounterMetricFamily(
            "vllm:sparsed_candidate_blocks",
            "Key blocks the patterns chose from; kept / candidate is the density.",
        )
        chosen.add_metric([], totals[3])
        yield chosen

    def describe(self) -> Iterator[Metric]:
        return iter(())


_collectors: dict[str, _StepCollector] = {}


def export_step_counters(folder: str) -> None:
    """Show the counters of `folder` on this process's /metrics page, in place of an earlier one."""
    if not folder or folder in _collectors:
        return
    for collector in _collectors.values():
        REGISTRY.unregister(collector)
    _collectors.clear()
    _collectors[folder] = _StepCollector(Path(folder))
    REGISTRY.register(_collectors[folder])
