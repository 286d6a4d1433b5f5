"""Requests through the real states and the real decoder, over the plain PyTorch model."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSettings, block_pattern, token_mask
from vllm_sparsed.attention.pattern_store import PatternStoreSize
from vllm_sparsed.config.parameters import parse_server_settings
from vllm_sparsed.config.settings import EngineSettings
from vllm_sparsed.decoding.batch_decoder import BatchDecoder
from vllm_sparsed.worker.request_state import Attention, RequestState
from vllm_sparsed.worker.step_candidates import StepCandidates, hidden_rows

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

Pass = list[list[int]]
"""[canvas position, token] of what a pass decided, ascending."""


@cache
def golden_model(name: str) -> ReferenceModel:
    return ReferenceModel.load(GOLDEN / name, torch.float32)


def engine_settings(
    mask_token_id: int, max_model_len: int = 640, server: dict[str, Any] | None = None
) -> EngineSettings:
    """Settings of an engine on a CPU, where sparse attention is never predicted not to pay."""
    sections = {"sparsed": {"block_size": 16, "select": 0.5}, **(server or {})}
    return EngineSettings(
        server=parse_server_settings(sections, "low_confidence"),
        max_model_len=max_model_len,
        max_batch_tokens=4 * max_model_len,
        mask_token_id=mask_token_id,
        store=PatternStoreSize(num_rows=100_000, width=4096),
        crossover=None,
        logit_shift=False,
        graph_tokens=0,
    )


def make_state(
    settings: EngineSettings,
    prompt: Sequence[int],
    canvas: int,
    extra_args: dict[str, Any],
    *,
    sent: Sequence[int] = (),
    last_resume: int | None = None,
    pages: Sequence[int] = (),
    name: str = "request",
    **sampling: Any,
) -> RequestState:
    """A request's state.

    Args:
        sent: canvas tokens that its client has from before a preemption.
        last_resume: the last block that may be the first to be run again.
        pages: for what it keeps of keys and values.
    """
    params = SamplingParams(
        max_tokens=canvas, extra_args=extra_args, **({"temperature": 0.0, "seed": 0} | sampling)
    )
    data = NewRequestData(
        req_id=name,
        prompt_token_ids=list(prompt),
        prefill_token_ids=[*prompt, *sent],
        mm_features=[],
        sampling_params=params,
        pooling_params=None,
        block_ids=(list(pages),) if pages else (),
        num_computed_tokens=0,
        lora_request=None,
    )
    return RequestState.from_request(data, settings, last_resume)


class PlainEngine:
    """Takes steps of any states together, each sequence by itself through the plain model.

    Attributes:
        history: of each state, what each forward pass decided on the canvas.
        patterns: of each state, per sequence and layer.
        built_in: of each state, the passes before the one that built them.
    """

    def __init__(self, model: Any, *, vocab_size: int, mask_token_id: int, shift: bool) -> None:
        self.model = model
        self.shift = int(shift)
        self.decoder = BatchDecoder(
            vocab_size=vocab_size,
            mask_token_id=mask_token_id,
            eos_token_id=None,
            eot_token_id=None,
            device="cpu",
            max_chunk_rows=10**6,
        )
        self.candidates = StepCandidates()
        self.history: dict[RequestState, list[Pass]] = {}
        self.patterns: dict[RequestState, list[list[Tensor]]] = {}
        self.built_in: dict[RequestState, int] = {}

    @classmethod
    def of_golden(cls, name: str) -> "PlainEngine":
        model = golden_model(name)
        dims = model.dimensions
        return cls(
            model,
            vocab_size=model.weights["lm_head.weight"].shape[0],
            mask_token_id=dims.mask_token_id,
            shift=dims.logit_shift,
        )

    def step(self, states: Sequence[RequestState]) -> list[list[int]]:
        """One denoising step of each; returns what each client gets."""
        for state in states:
            self.history.setdefault(state, [])
        active = [s for s in states if s.decides() or s.builds_patterns()]
        decided: dict[RequestState, Any] = {}
        if active:
            candidates = self.candidates.of(active)
            rows, starts, total = [], {}, 0
            for sequence in (0, 1):
                for state in active:
                    if sequence < state.plan.num_sequences:
                        starts[state.request_id, sequence] = total
                        rows.append(self._logits(state, sequence))
                        total += len(rows[-1])
            hidden = torch.cat(rows)
            source = hidden_rows(starts, active, candidates, 0, self.shift)
            guided = (candidates.cfg_scale > 0)[candidates.request].nonzero()[0]
            unconditional = None
            if guided.size:
                places = hidden_rows(starts, active, candidates, 1, self.shift, guided)
                unconditional = hidden[torch.from_numpy(places)]
            tokens = self.decoder.decode(
                candidates, hidden[torch.from_numpy(source)], unconditional, lambda x: x
            )
            sizes = [state.judged.size for state in active]
            for state, part in zip(active, tokens.split(sizes), strict=True):
                decided[state] = part.numpy()
        for state in states:
            before = state.tokens.copy()
            own = decided.get(state)
            state.commit(own)
            if own is not None:
                changed = (before != state.tokens).nonzero()[0]
                prompt_len = state.plan.prompt_len
                self.history[state].append(
                    [
                        [int(p) - prompt_len, int(state.tokens[p])]
                        for p in changed
                        if p >= prompt_len
                    ]
                )
        return [state.take_output() for state in states]

    def run(self, states: Sequence[RequestState]) -> list[list[int]]:
        """All states side by side to their ends; returns the tokens each client gets."""
        outputs: list[list[int]] = [[] for _ in states]
        while not all(state.finished for state in states):
            going = [i for i, state in enumerate(states) if not state.finished]
            for i, tokens in zip(going, self.step([states[i] for i in going]), strict=True):
                outputs[i] += tokens
        return outputs

    def _logits(self, state: RequestState, sequence: int) -> Tensor:
        tokens = torch.from_numpy(state.sequence_tokens(sequence).copy()).long()
        if state.attention == Attention.SPARSE:
            patterns = self.patterns[state][sequence]
            size = state.plan.block_size
            masks = [token_mask(pattern, len(tokens), size) for pattern in patterns]
            logits: Tensor = self.model.logits(tokens, masks)[0]
            return logits
        logits, layers = self.model.logits(tokens)
        if state.attention == Attention.BUILDING:
            settings = SparseSettings(0.0, state.plan.select, state.plan.block_size)
            built = [block_pattern(layer, state.plan.canvas_len, settings) for layer in layers]
            self.patterns.setdefault(state, []).append(built)
            self.built_in[state] = state.num_passes
        return logits
