"""CUDA graphs of short forward passes, whose kernels take less time than the host to launch them.

A denoising request repeats the same pass, over prompt and canvas, in every step. Its kernels are
recorded once, at its own size, and launched together from then on: nothing is padded, and each
kernel gets the arguments that it had, so a replayed pass computes bit for bit what an ordinary one
does. A graph serves every batch that looks alike to the host; what lies in the batch's tensors is
copied into the graph's own. Window passes, where keys and values are kept, are padded to few sizes
by the packer, so that a graph serves windows of other requests and places too.
"""

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Protocol

import torch

from vllm_sparsed.logger import init_logger
from vllm_sparsed.worker.metadata_tensors import copy_tensors, describe
from vllm_sparsed.worker.packing import PackedBatch

logger = init_logger(__name__)

MAX_GRAPHS: Final = 32
"""Graphs that are kept; the one not used for longest goes first."""

_RUNS_BEFORE_RECORDING: Final = 2
"""Ordinary passes of a batch before it is recorded. They compile what is to be compiled, and a
batch that stays for some steps is likely to stay for more."""

RunModel = Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
"""Token ids, positions and attention metadata to hidden states."""


class RecordedPass(Protocol):
    """A pass that can be run again."""

    def replay(self) -> torch.Tensor:
        """Run it on what its inputs hold now; the result is valid until the next pass."""
        ...


Recorder = Callable[[Callable[[], torch.Tensor]], RecordedPass]
"""Records a pass, which it may run."""


@dataclass(slots=True)
class _Graph:
    """A recorded pass, the tensors it reads, and the batch of which they hold the content."""

    recorded: RecordedPass
    batch: PackedBatch
    tensors: list[torch.Tensor]
    holds: weakref.ref[PackedBatch]


class PassGraphs:
    """Replays the passes of batches that come again."""

    def __init__(
        self,
        run_model: RunModel,
        layers: Sequence[Any],
        token_ids: torch.Tensor,
        max_tokens: int,
        record: Recorder,
    ) -> None:
        """Prepare.

        Args:
            run_model: of the model runner.
            layers: vLLM's attention layers.
            token_ids: int32; every pass finds its tokens there, from the first element on.
            max_tokens: longer passes are not recorded.
            record: how to record.
        """
        self.max_tokens = max_tokens
        self.num_replays = 0
        self._run_model = run_model
        self._layers = layers
        self._token_ids = token_ids
        self._record = record
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        # Of each batch that may be recorded: what the host sees of it, and how often it ran.
        self._keys: weakref.WeakKeyDictionary[PackedBatch, Hashable] = weakref.WeakKeyDictionary()
        self._runs: weakref.WeakKeyDictionary[PackedBatch, int] = weakref.WeakKeyDictionary()
        self._window_runs: OrderedDict[Hashable, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, batch: PackedBatch) -> torch.Tensor | None:
        """Run a batch whose tokens are in `token_ids`, if a graph serves it.

        Returns:
            Hidden states [tokens, hidden_size], valid until the next pass; None without a graph.
        """
        if batch.num_tokens > self.max_tokens:
            return None
        if batch not in self._keys:
            # What must not be recorded looks like no batch.
            self._keys[batch] = self._key(batch) if self._may_be_recorded(batch) else None
        key = self._keys[batch]
        if key is None:
            return None
        graph = self._graphs.get(key)
        if graph is None:
            if self._count_run(batch, key) <= _RUNS_BEFORE_RECORDING:
                return None
            graph = self._capture(batch, key)
            if graph is None:
                return None
        self._graphs.move_to_end(key)
        if graph.holds() is not batch:
            torch._foreach_copy_(graph.tensors, self._tensors(batch))
            graph.holds = weakref.ref(batch)
        self.num_replays += 1
        return graph.recorded.replay()

    def _count_run(self, batch: PackedBatch, key: Hashable) -> int:
        """How often such a pass has run: this very batch, or, as windows move on after some passes
        to where others have been, any that looks like it."""
        if not getattr(_metadata(batch), "windows", ()):
            runs = self._runs[batch] = self._runs.get(batch, 0) + 1
            return runs
        self._window_runs[key] = self._window_runs.pop(key, 0) + 1
        while len(self._window_runs) > 4 * MAX_GRAPHS:
            self._window_runs.popitem(last=False)
        return self._window_runs[key]

    def capture(self, batch: PackedBatch) -> None:
        """Record the pass of a batch that has just run."""
        self._capture(batch, self._key(batch))

    def clear(self) -> None:
        """Forget all graphs: what they read has moved."""
        self._graphs.clear()
        # Their pool is given back here and not before: its memory serves nothing else.
        torch.accelerator.empty_cache()

    def _capture(self, batch: PackedBatch, key: Hashable) -> _Graph | None:
        """Record a pass.

        Returns:
            None where memory is short: only shorter passes are recorded from now on; or where it
            cannot be recorded: no pass is any more.
        """
        metadata = copy_tensors(_metadata(batch), self._token_ids.device, torch.Tensor.clone)
        own = replace(
            batch,
            sequences=(),
            starts={},
            positions=batch.positions.clone(),
            attention=dict.fromkeys(batch.attention, metadata),
        )
        token_ids = self._token_ids[: own.num_tokens]

        def run() -> torch.Tensor:
            return self._run_model(token_ids, own.positions, own.attention)

        try:
            try:
                recorded = self._record(run)
            except torch.OutOfMemoryError:
                # What the allocator keeps for later it does not give back during a recording.
                torch.accelerator.empty_cache()
                recorded = self._record(run)
        except torch.OutOfMemoryError:
            logger.warning(
                "Memory is short for a CUDA graph of %d tokens: only shorter passes are recorded "
                "from now on",
                batch.num_tokens,
            )
            self.max_tokens = batch.num_tokens - 1
            return None
        except RuntimeError as error:
            logger.warning(
                "A forward pass of %d tokens could not be recorded as a CUDA graph, so all passes "
                "run without one: %s",
                batch.num_tokens,
                error,
            )
            self.max_tokens = 0
            self._graphs.clear()
            return None
        graph = _Graph(recorded, own, self._tensors(own), weakref.ref(batch))
        self._graphs[key] = graph
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph

    def _may_be_recorded(self, batch: PackedBatch) -> bool:
        """Whether all that a pass of this batch does is to launch kernels, alike each time.

        Patterns are built in one step alone, and windows beside whole sequences hardly come again.
        An implementation that an experiment has put into a layer may do more in each pass than a
        graph would repeat.
        """
        metadata = _metadata(batch)
        return (
            all(other is metadata for other in batch.attention.values())
            and not getattr(metadata, "builds", ())
            and (not getattr(metadata, "windows", ()) or metadata.num_whole == 0)
            and all(type(x.impl) is x.attn_backend.get_impl_cls() for x in self._layers)
        )

    def _key(self, batch: PackedBatch) -> Hashable:
        return (batch.num_tokens, describe(_metadata(batch), self._token_ids.device)[0])

    def _tensors(self, batch: PackedBatch) -> list[torch.Tensor]:
        return [batch.positions, *describe(_metadata(batch), self._token_ids.device)[1]]


def _metadata(batch: PackedBatch) -> Any:
    return next(iter(batch.attention.values()))


class CudaGraph:
    """A pass recorded as a CUDA graph; its memory is shared with all others."""

    _pool: Any = None
    _stream: torch.cuda.Stream | None = None
    _alive: ClassVar["weakref.WeakSet[CudaGraph]"] = weakref.WeakSet()

    def __init__(self, run: Callable[[], torch.Tensor]) -> None:
        """Record the pass, without computing it.

        Raises:
            RuntimeError: the pass does what cannot be recorded, or memory is short.
        """
        from vllm.utils.torch_utils import weak_ref_tensor

        if CudaGraph._stream is None:
            CudaGraph._stream = torch.cuda.Stream()
        if not CudaGraph._alive:
            # One pool: passes follow each other, and each result is used up before the next pass.
            # PyTorch gives it up with the last graph in it, after `clear` or an engine's end.
            CudaGraph._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        CudaGraph._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(CudaGraph._stream):
            # Not `torch.cuda.graph`, which empties the allocator's cache each time.
            self._graph.capture_begin(pool=CudaGraph._pool, capture_error_mode="thread_local")
            try:
                output = run()
            except BaseException:
                # The first error says what is wrong.
                with contextlib.suppress(RuntimeError):
                    self._end_capture()
                raise
            self._end_capture()
        torch.cuda.current_stream().wait_stream(CudaGraph._stream)
        # The graph owns the memory: a weak reference lets the next graph use it too.
        self._output: torch.Tensor = weak_ref_tensor(output)
        CudaGraph._alive.add(self)

    def _end_capture(self) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            # PyTorch fails before its allocator has left the pool, which then could give nothing
            # back any more; where it had left, leaving again is an error without effect.
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), CudaGraph._pool)
            raise

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._output
