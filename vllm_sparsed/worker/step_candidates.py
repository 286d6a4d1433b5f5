"""The candidates of one step, from the states of its requests."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_sparsed.decoding.candidates import Candidates
from vllm_sparsed.decoding.paces import ranking_of
from vllm_sparsed.worker.request_state import RequestState


class StepCandidates:
    """Lists the candidates of a step; what a request never changes is kept while requests stay."""

    def __init__(self) -> None:
        self._states: list[RequestState] = []
        self._without_candidates: Candidates

    def of(self, states: Sequence[RequestState]) -> Candidates:
        """All candidates of the requests that decide or build in this step, one by one."""
        if self._states != list(states):
            self._states = list(states)
            self._without_candidates = _without_candidates(states)
        lengths = [state.candidates.size for state in states]
        selections = [selection for state in states for selection in state.selections]
        return replace(
            self._without_candidates,
            request=np.repeat(np.arange(len(states), dtype=np.int32), lengths),
            group=np.repeat(
                np.arange(len(selections), dtype=np.int32), [s.size for s in selections]
            ),
            position=np.concatenate([state.candidates for state in states]).astype(np.int32),
            rule=np.array([s.rule for s in selections], dtype=np.int64),
            quota=np.array([s.quota for s in selections], dtype=np.int64),
            bound=np.array([s.bound for s in selections], dtype=np.float64),
            step=np.array([state.step for state in states], dtype=np.int64),
            probability=np.array(
                [state.unmask_probability() for state in states], dtype=np.float64
            ),
        )


def _without_candidates(states: Sequence[RequestState]) -> Candidates:
    sampling = [state.params for state in states]
    diffusion = [state.plan.parameters for state in states]
    both = list(zip(sampling, diffusion, strict=True))
    places, counts = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    numbers = np.empty(0, dtype=np.float64)
    return Candidates(
        request=places,
        group=places,
        position=places,
        rule=counts,
        quota=counts,
        bound=numbers,
        rankings=tuple(ranking_of(p.alg, p.pace[0] if p.pace else None) for p in diffusion),
        temperature=np.array([p.temperature for p in sampling], dtype=np.float64),
        top_p=np.array(
            [s.top_p if d.top_p is None else d.top_p for s, d in both], dtype=np.float64
        ),
        top_k=np.array([s.top_k if d.top_k is None else d.top_k for s, d in both], dtype=np.int64),
        alg_temp=np.array([p.alg_temp for p in diffusion], dtype=np.float64),
        seed=np.array([state.seed for state in states], dtype=np.int64),
        step=counts,
        probability=numbers,
        cfg_scale=np.array([p.cfg_scale for p in diffusion], dtype=np.float64),
        logits_eos_inf=np.array([p.logits_eos_inf for p in diffusion], dtype=np.bool_),
        confidence_eos_eot_inf=np.array(
            [p.confidence_eos_eot_inf for p in diffusion], dtype=np.bool_
        ),
    )


def hidden_rows(
    starts: Mapping[tuple[str, int], int],
    states: Sequence[RequestState],
    candidates: Candidates,
    sequence: int,
    shift: int,
    subset: npt.NDArray[np.intp] | None = None,
) -> npt.NDArray[np.int64]:
    """Packed rows whose hidden states decide the candidates (all, or a subset of them).

    Args:
        starts: first packed token of each sequence, by request id and sequence index.
        states: of the requests of `candidates`.
        candidates: of the step.
        sequence: 0 conditional, 1 unconditional.
        shift: 1 where row p - 1 decides position p, as in Dream (row 0 is used twice).
        subset: indices into `candidates`; None: all.
    """
    first = np.array([starts.get((s.request_id, sequence), 0) for s in states], dtype=np.int64)
    request, position = candidates.request, candidates.position
    if subset is not None:
        request, position = request[subset], position[subset]
    return first[request] + np.maximum(position - shift, 0)
