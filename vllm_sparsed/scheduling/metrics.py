"""Counters of denoising steps and pattern density, on vLLM's /metrics page.

They bear vLLM's labels, and vLLM's names for diffusion models where it has one, so `vllm bench
serve` shows them. vLLM's own statistics cannot carry them: it takes a model for such a one only
where its requests have neither temperature nor seed. The scheduler counts, in the engine core;
/metrics is served by the front end. A single front-end process reads the engine cores' counters
from small files of one folder per engine start. Where there are several, Prometheus' multiprocess
mode, which vLLM sets up, adds up what each process writes, and the engine cores write as well.
"""

import atexit
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

from vllm_sparsed.worker.step_output import ATTENTIONS, StepReport

if TYPE_CHECKING:
    from vllm.config import VllmConfig

COUNTERS_KEY: Final = "sparsed_counters"
"""Key of `additional_config` under which the counters' folder travels to the other processes."""

MULTIPROCESS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Prometheus' environment variable."""

STEPS: Final = "vllm:diffusion_num_denoising_steps"
_HELP: Final = {
    STEPS: "Denoising steps of requests, by the attention they ran with.",
    "vllm:diffusion_num_canvas_positions": "Canvas positions of the requests of all steps.",
    "vllm:diffusion_num_committed_tokens": "Tokens that were decided.",
    "vllm:diffusion_num_candidates": "Positions that the steps could have decided.",
    "vllm:sparsed_kept_blocks": "Key blocks kept by the patterns built so far.",
    "vllm:sparsed_candidate_blocks": (
        "Key blocks the patterns chose from; kept / candidate is the density."
    ),
}
# Of each counter its name and the value of the label `attention`, where it has one.
_COUNTERS: Final = (
    *((STEPS, attention) for attention in ATTENTIONS),
    *((name, None) for name in _HELP if name != STEPS),
)
_RECORD: Final = struct.Struct(f"<{len(_COUNTERS)}d")


class StepCounters:
    """The monotonic counters of one engine core; a folder on another host is no error."""

    def __init__(self, path: Path | None, model_name: str = "", engine: str = "0") -> None:
        """Start at zero.

        Args:
            path: of the file for a single front-end process; None: there is none.
            model_name, engine: vLLM's labels.
        """
        self._values = [0.0] * len(_COUNTERS)
        self._map: mmap.mmap | None = None
        self._shared: list[Callable[[float], None]] = []
        if os.environ.get(MULTIPROCESS_FOLDER):
            self._shared = _shared_counters(model_name, engine)
        elif path is not None and path.parent.is_dir():
            path.write_bytes(_RECORD.pack(*self._values) + model_name.encode())
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _RECORD.size)

    @classmethod
    def for_writing(cls, vllm_config: "VllmConfig") -> "StepCounters":
        """The counters of this engine core, one of each data-parallel rank."""
        additional = vllm_config.additional_config
        folder = additional.get(COUNTERS_KEY) if isinstance(additional, dict) else None
        engine = str(vllm_config.parallel_config.data_parallel_index)
        path = Path(folder) / engine if folder else None
        return cls(path, str(vllm_config.model_config.served_model_name), engine)

    def add(self, report: StepReport, canvas_len: int) -> None:
        """Count the step of one request with a canvas of so many tokens."""
        amounts = (
            *(float(report.attention == attention) for attention in ATTENTIONS),
            canvas_len,
            report.decided,
            report.candidates,
            report.kept_blocks,
            report.pattern_blocks,
        )
        for i, amount in enumerate(amounts):
            self._values[i] += amount
            if self._shared and amount:
                self._shared[i](amount)
        if self._map is not None:
            _RECORD.pack_into(self._map, 0, *self._values)


def _shared_counters(model_name: str, engine: str) -> list[Callable[[float], None]]:
    """Counters in Prometheus' multiprocess mode; each entry adds to one of `_COUNTERS`."""
    # A file of their own: the process' other one belongs to vLLM's counters.
    value_class = MultiProcessValue(lambda: f"sparsed-{os.getpid()}")
    shared = []
    for name, attention in _COUNTERS:
        labels, values = _labels(model_name, engine, attention)
        value = value_class("counter", name, f"{name}_total", labels, values, _HELP[name])
        shared.append(value.inc)
    return shared


def _labels(
    model_name: str, engine: str, attention: str | None
) -> tuple[Sequence[str], Sequence[str]]:
    """Names and values."""
    if attention is None:
        return ("model_name", "engine"), (model_name, engine)
    return ("model_name", "engine", "attention"), (model_name, engine, attention)


def make_counters_folder() -> str:
    """A new folder for the counters of one engine, removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="vllm-sparsed-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class _StepCollector(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        families = {
            name: CounterMetricFamily(
                name, text, labels=_labels("", "", "" if name == STEPS else None)[0]
            )
            for name, text in _HELP.items()
        }
        for path in sorted(self._folder.glob("*")):  # none where the engine has ended
            data = path.read_bytes()
            if len(data) < _RECORD.size:
                continue  # its engine is just writing it
            model_name = data[_RECORD.size :].decode()
            values = _RECORD.unpack(data[: _RECORD.size])
            for (name, attention), value in zip(_COUNTERS, values, strict=True):
                families[name].add_metric(_labels(model_name, path.name, attention)[1], value)
        yield from families.values()

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
