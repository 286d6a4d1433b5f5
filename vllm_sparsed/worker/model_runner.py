"""Runs the denoising steps: forward passes, decisions, tokens out."""

import contextlib
import gc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model_loader
from vllm.sequence import IntermediateTensors
from vllm.utils.mem_utils import DeviceMemoryProfiler, format_gib
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.utils import allocate_kv_cache, bind_kv_cache, clear_layer_kv_caches

from vllm_sparsed.attention.pattern_store import PatternStore
from vllm_sparsed.config.parameter_table import BLOCK_SIZE_BY_LENGTH, SELECT_BY_LENGTH
from vllm_sparsed.config.settings import engine_settings
from vllm_sparsed.decoding import NOT_FINITE
from vllm_sparsed.decoding.batch_decoder import BatchDecoder, Candidates
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.logger import init_logger
from vllm_sparsed.models.special_tokens import end_of_turn_token
from vllm_sparsed.worker.cuda_graphs import CudaGraph, PassGraphs, Recorder
from vllm_sparsed.worker.density import kept_blocks, report_density
from vllm_sparsed.worker.memory_errors import fits_in_memory
from vllm_sparsed.worker.packing import BatchPacker, PackedBatch, PackedSequence
from vllm_sparsed.worker.request_state import RequestState
from vllm_sparsed.worker.runner_interface import RunnerInterface
from vllm_sparsed.worker.shown_canvases import ShownCanvases
from vllm_sparsed.worker.step_candidates import StepCandidates, hidden_rows
from vllm_sparsed.worker.step_faults import Outcome, describe, run_apart_where_it_fails
from vllm_sparsed.worker.step_output import ATTENTIONS, DenoisingOutput, StepReport
from vllm_sparsed.worker.token_buffer import TokenBuffer

logger = init_logger(__name__)

LOGITS_CHUNK_BYTES = 256 * 2**20
"""Float32 logits that are materialised at once: a whole canvas of them would be gigabytes."""


class DenoisingModelRunner(RunnerInterface):
    """Device-agnostic runner of bidirectional diffusion language models.

    One engine step is one denoising step of every scheduled request over its whole sequence.
    Nothing is kept on the device between steps but the block patterns and, where a request asks for
    it, keys and values.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config)
        self.device = device
        self.settings = engine_settings(vllm_config)
        self.requests: dict[str, RequestState] = {}
        self.shown_canvases = ShownCanvases()
        self.store: PatternStore | None = None
        self.packer: BatchPacker
        self.decoder: BatchDecoder
        self.graphs: PassGraphs | None = None
        self._tokens = TokenBuffer(self.settings.max_batch_tokens, device)
        self._step_candidates = StepCandidates()
        # Of preempted requests: where they may start again, see `RequestState.from_request`.
        self._last_resumes: dict[str, int] = {}
        # Why requests that have been sent here could not be started.
        self._unstarted: dict[str, str] = {}
        self._warned_of_non_finite = False
        self._is_prepared = False

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the model through vLLM's loaders and set up what depends on its dimensions."""
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        with DeviceMemoryProfiler() as profiler:
            loader = get_model_loader(self.load_config)
            self.model = loader.load_model(
                vllm_config=self.vllm_config, model_config=self.model_config
            )
        self.model_memory_usage = profiler.consumed_memory
        logger.info("Model loading took %s GiB of memory", format_gib(self.model_memory_usage))
        vocab_size = self.model_config.get_vocab_size()
        self.max_chunk_rows = max(16, LOGITS_CHUNK_BYTES // (4 * vocab_size))
        self.decoder = BatchDecoder(
            vocab_size=vocab_size,
            mask_token_id=self.settings.mask_token_id,
            eos_token_id=self.model_config.hf_config.eos_token_id,
            eot_token_id=end_of_turn_token(self.model_config),
            device=self.device,
            max_chunk_rows=self.max_chunk_rows,
        )

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        kv_cache_allocation_context: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Allocate the pattern store and, where keys and values are kept, vLLM's pages for them.

        Raises:
            StartupError: they do not fit in memory.
        """
        self.prepare()
        if not kv_cache_config.kv_cache_tensors:
            return
        layout = self.vllm_config.cache_config.get_resolved_kv_cache_layout()
        size = format_gib(kv_cache_config.kv_cache_tensors[0].size)
        with (
            fits_in_memory(f"The store of keys and values of {size} GiB"),
            kv_cache_allocation_context or contextlib.nullcontext(),
        ):
            kv_caches = allocate_kv_cache(kv_cache_config, self.device, layout)
        bind_kv_cache(
            kv_caches,
            self.vllm_config.compilation_config.static_forward_context,
            self.kv_caches,
        )

    def prepare(self) -> None:
        """Allocate the pattern store and set up what packs and records passes; once.

        Raises:
            StartupError: the store does not fit in memory.
        """
        if self._is_prepared:
            return
        self._is_prepared = True
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        first_rank = get_tensor_model_parallel_rank() == 0
        size = self.settings.store
        if size is not None:
            num_heads = next(iter(layers.values())).num_heads
            store_gib = format_gib(size.num_bytes(len(layers), num_heads))
            with fits_in_memory(f"The pattern store of {store_gib} GiB"):
                self.store = PatternStore(size, len(layers), num_heads, self.device)
            if first_rank:
                defaults = self.settings.server.defaults
                logger.info(
                    "SparseD: skip %.3g, select %s, block size %s; pattern store of %d rows x %d "
                    "blocks for %d layers and %d heads: %s GiB",
                    defaults.sparsed_skip,
                    defaults.sparsed_select or SELECT_BY_LENGTH,
                    defaults.sparsed_block_size or BLOCK_SIZE_BY_LENGTH,
                    size.total_rows,
                    size.width,
                    len(layers),
                    num_heads,
                    store_gib,
                )
        self.packer = BatchPacker(self.vllm_config, self.store, self.device)
        if self.settings.graph_tokens and self.device.type == "cuda":
            self.record_passes(self.settings.graph_tokens, CudaGraph)

    def record_passes(self, max_tokens: int, record: Recorder) -> None:
        """From now on record passes of up to so many tokens and replay them."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention)
        self.packer.pad_windows(min(max_tokens, self.settings.max_batch_tokens))
        self.graphs = PassGraphs(
            self.run_model, list(layers.values()), self._tokens.token_ids, max_tokens, record
        )

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> ModelRunnerOutput:
        """One denoising step of the scheduled requests.

        Returns:
            For each request the canvas tokens that became final, possibly none, and a report. What
            fails for one request is in its report.

        Raises:
            DeviceLostError: the device cannot be used any more.
        """
        self._update_requests(scheduler_output)
        if not scheduler_output.num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        request_ids = list(scheduler_output.num_scheduled_tokens)
        reports = self._denoise(
            [self.requests[name] for name in request_ids if name in self.requests]
        )
        for name, error in self._unstarted.items():
            reports[name] = StepReport(error=error)
        return DenoisingOutput(
            req_ids=request_ids,
            req_id_to_index={name: i for i, name in enumerate(request_ids)},
            sampled_token_ids=[
                [] if reports[name].error else self.requests[name].take_output()
                for name in request_ids
            ],
            reports=reports,
        )

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        ended = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        # One that has not taken a step yet is not known here.
        gone = [self.requests.pop(name) for name in ended if name in self.requests]
        if gone:
            self.packer.forget(gone)
        for state in gone:
            if state.request_id in scheduler_output.finished_req_ids:
                state.log_passes()
            else:
                self._last_resumes[state.request_id] = state.whole_block
            self.shown_canvases.end(state)
            self._release_patterns(state)
        self._unstarted.clear()
        for name in scheduler_output.finished_req_ids:
            self._last_resumes.pop(name, None)
        for data in scheduler_output.scheduled_new_reqs:
            try:
                self.requests[data.req_id] = RequestState.from_request(
                    data, self.settings, self._last_resumes.get(data.req_id)
                )
            except Exception as error:
                # The scheduler has planned it; what else is wrong with it is its own matter.
                self._unstarted[data.req_id] = describe(error)

    def _denoise(self, states: Sequence[RequestState]) -> dict[str, StepReport]:
        """Advance every request by one step; waits for the device once.

        Returns:
            A report of each, by request id.
        """
        reports = {state.request_id: StepReport(ATTENTIONS[state.attention]) for state in states}
        active = [state for state in states if state.takes_pass()]
        outcome: Outcome[npt.NDArray[np.int64]] = Outcome()
        if active:
            outcome = run_apart_where_it_fails(
                active,
                lambda some: self._forward_and_decode(some, reports),
                self._undo,
                self.device,
                one_rank=get_tensor_model_parallel_world_size() == 1,
            )
        decided: dict[str, npt.NDArray[np.int64]] = {}
        for i, tokens in outcome.results.items():
            decided[active[i].request_id] = tokens
            if (tokens == NOT_FINITE).any():
                outcome.errors[i] = self._non_finite()
        for i, error in outcome.errors.items():
            reports[active[i].request_id].error = error
        for state in states:
            report = reports[state.request_id]
            if report.error is not None:
                continue
            try:
                state.commit(decided.get(state.request_id))
                report.next_tokens = state.next_tokens(self.settings.max_batch_tokens)
                report.next_is_window = state.window is not None
            except Exception as error:
                # On the host, in what belongs to this request alone.
                report.error = describe(error)
            report.candidates, report.decided = state.last_candidates, state.last_decided
        return reports

    def _non_finite(self) -> str:
        message = "the model gave non-finite logits (its weights or activations have NaN or inf)"
        if not self._warned_of_non_finite:
            self._warned_of_non_finite = True
            logger.error(
                "%s: a request ends with an error, as will others that are not reported here; with "
                "float16 try --dtype bfloat16",
                message,
            )
        return message

    def _undo(self, states: Sequence[RequestState]) -> None:
        """Take back what a failed step of requests has begun."""
        building = [state for state in states if state.builds_patterns()]
        # What is kept of them has the rows that they give back here.
        self.packer.forget(building)
        for state in building:
            self._release_patterns(state)

    def _forward_and_decode(
        self, states: Sequence[RequestState], reports: Mapping[str, StepReport]
    ) -> list[npt.NDArray[np.int64]]:
        """Run the passes and decide.

        Returns:
            For each request int64 [candidates], see `BatchDecoder.decode`.
        """
        building = [state for state in states if state.builds_patterns()]
        for state in building:
            self._allocate_patterns(state)

        # Where two sequences of a guided request do not fit together, the second waits its turn.
        first: list[PackedSequence] = [(state, 0) for state in states]
        second: list[PackedSequence] = []
        for state in states:
            if state.plan.guided:
                start, end = state.rows
                in_turn = 2 * (end - start) > self.settings.max_batch_tokens
                (second if in_turn else first).append((state, 1))

        batch = self.packer.pack(first)
        self._tokens.fill(batch, 0)
        output = self.run_pass(batch)
        # The device works: what the host prepares from here on costs no time.
        candidates = self._step_candidates.of(states)
        shift = 1 if self.model.logit_shift else 0
        source = hidden_rows(batch.starts, states, candidates, 0, shift)
        hidden = output[to_device(source, self.device)]
        guided = np.flatnonzero((candidates.cfg_scale > 0)[candidates.request])
        unconditional: torch.Tensor | None = None
        if guided.size:
            unconditional = hidden.new_empty((guided.size, hidden.shape[1]))
            self._take_unconditional(unconditional, output, batch, states, candidates, guided)
        del output
        if second:
            batch = self.packer.pack(second)
            self._tokens.fill(batch, 1)
            output = self.run_pass(batch)
            if unconditional is not None:
                self._take_unconditional(unconditional, output, batch, states, candidates, guided)
            del output

        tokens = self.decoder.decode(candidates, hidden, unconditional, self.model.compute_logits)
        num_candidates = len(tokens)
        if building and self.store is not None:
            # One copy for both: it waits for the device.
            tokens = torch.cat([tokens, kept_blocks(building, self.store)])
        result: npt.NDArray[np.int64] = tokens.cpu().numpy()
        if building and self.store is not None:
            report_density(building, result[num_candidates:], self.store, reports)
        ends = np.cumsum([state.judged.size for state in states])
        return np.split(result[:num_candidates], ends[:-1])

    def run_pass(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states [tokens, hidden_size] of a batch whose tokens have been copied, valid until
        the next pass."""
        if self.graphs is not None:
            output = self.graphs.run(batch)
            if output is not None:
                return output
        token_ids = self._tokens.token_ids[: batch.num_tokens]
        return self.run_model(token_ids, batch.positions, batch.attention)

    def run_model(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attention: dict[str, Any] | None
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden_size] of packed sequences.

        Args:
            token_ids: int32 [tokens] on the device.
            positions: int64 [tokens] on the device, position within the sequence.
            attention: metadata by layer name.
        """
        with set_forward_context(
            attention, self.vllm_config, num_tokens=len(token_ids), slot_mapping={}
        ):
            output: torch.Tensor = self.model(input_ids=token_ids, positions=positions)
        return output

    def _take_unconditional(
        self,
        unconditional: torch.Tensor,
        output: torch.Tensor,
        batch: PackedBatch,
        states: Sequence[RequestState],
        candidates: Candidates,
        guided: npt.NDArray[np.intp],
    ) -> None:
        """Copy the guidance sequences' hidden states that a pass has, one per guided candidate."""
        in_pass = np.array([(state.request_id, 1) in batch.starts for state in states])
        chosen = np.flatnonzero(in_pass[candidates.request[guided]])
        shift = 1 if self.model.logit_shift else 0
        source = hidden_rows(batch.starts, states, candidates, 1, shift, guided[chosen])
        unconditional[to_device(chosen, self.device)] = output[to_device(source, self.device)]

    def _allocate_patterns(self, state: RequestState) -> None:
        assert self.store is not None
        rows = state.plan.num_pattern_rows // state.plan.num_sequences
        for _ in range(state.plan.num_sequences):
            # One by one: what the first has is given back where the second gets none.
            state.pattern_rows.append(self.store.allocate(rows))

    def _release_patterns(self, state: RequestState) -> None:
        if self.store is not None:
            for rows in state.pattern_rows:
                self.store.release(rows)
        state.pattern_rows = []

    def update_max_model_len(self, max_model_len: int) -> None:
        self.settings = engine_settings(self.vllm_config)

    def weights_replaced(self) -> None:
        if self.graphs is not None:
            # Quantized weights may have new places.
            self.graphs.clear()

    def shutdown(self) -> None:
        """Free the device's memory."""
        self.requests.clear()
        self.graphs = None
        clear_layer_kv_caches(get_layers_from_vllm_config(self.vllm_config, Attention).values())
        self.kv_caches.clear()
        self.store = None
        self.model = None
        # They hold tensors of the device too; nothing runs any more.
        for name in ("packer", "decoder", "_step_candidates", "_tokens"):
            vars(self).pop(name, None)
        gc.collect()
