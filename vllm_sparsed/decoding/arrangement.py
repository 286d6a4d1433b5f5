"""Candidates put in decoding order, and what the device needs of them."""

from dataclasses import dataclass, fields, replace
from typing import Any, Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_sparsed.decoding.candidates import Candidates
from vllm_sparsed.decoding.treatments import Segment, segments_of, treatment_codes
from vllm_sparsed.device_copy import to_device
from vllm_sparsed.kernels.confidence_ranking import Rule

Array = npt.NDArray[Any]
ArrayT = TypeVar("ArrayT", Array, Tensor)

# By numpy's kind of dtype: what is sent in 64 bits, and what arrives.
_TENSOR_KINDS: Final = {
    "b": (np.int64, torch.bool),
    "i": (np.int64, torch.int64),
    "f": (np.float64, torch.float64),
}


@dataclass(frozen=True, slots=True)
class CandidateFields(Generic[ArrayT]):
    """What the device needs of R candidates in decoding order, K groups of them.

    Integers are int64, numbers float64. What no candidate needs is None.

    Attributes:
        position, seed, step: [R], coordinates of the random numbers.
        group: [R], ascending number of the candidate's group.
        first: [K + 1], where each group's candidates begin, and their number.
        quota: [K].
        rule, bound: [K]; None: COUNT everywhere.
        probability: [K], with which each of those counted is decided.
        order: [R], which of the given candidates is at each place.
        unconditional: which of the guidance sequences' hidden states each guided candidate has.
        temperature, top_p, top_k, alg_temp, cfg_scale: [R].
        last_if_end: bool [R], whether a token that ends the text has the confidence -inf.
    """

    position: ArrayT
    seed: ArrayT
    step: ArrayT
    group: ArrayT
    first: ArrayT
    quota: ArrayT
    rule: ArrayT | None = None
    bound: ArrayT | None = None
    probability: ArrayT | None = None
    order: ArrayT | None = None
    unconditional: ArrayT | None = None
    temperature: ArrayT | None = None
    top_p: ArrayT | None = None
    top_k: ArrayT | None = None
    alg_temp: ArrayT | None = None
    cfg_scale: ArrayT | None = None
    last_if_end: ArrayT | None = None

    def part(self, start: int, end: int) -> "CandidateFields[ArrayT]":
        """The fields that shape the logits of the candidates [start, end)."""

        def cut(values: ArrayT | None) -> ArrayT | None:
            return None if values is None else values[start:end]

        return replace(
            self,
            position=self.position[start:end],
            seed=self.seed[start:end],
            step=self.step[start:end],
            temperature=cut(self.temperature),
            top_p=cut(self.top_p),
            top_k=cut(self.top_k),
        )


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Candidates in decoding order: guided ones first, those of one treatment and group together.

    Attributes:
        num_candidates: R.
        segments: cover the candidates in order.
        largest_top_k: largest top_k asked for, at most the vocabulary; 0 where none is.
        fields: on the host.
    """

    num_candidates: int
    segments: tuple[Segment, ...]
    largest_top_k: int
    fields: CandidateFields[Array]


def arrange(candidates: Candidates, vocab_size: int) -> Arrangement:
    """Put candidates in decoding order.

    Args:
        candidates: at least one.
        vocab_size: top_k is clamped to it.
    """
    request = candidates.request.astype(np.int64)
    group = candidates.group.astype(np.int64)
    position = candidates.position.astype(np.int64)
    codes = treatment_codes(candidates)
    unconditional = None
    order = _decoding_order(codes[request], group, position)
    if order is not None:
        guided = (candidates.cfg_scale > 0)[request]
        if guided.any():
            unconditional = (np.cumsum(guided) - 1)[order[guided[order]]]
        request, group, position = request[order], group[order], position[order]
    segments = segments_of(codes[request])
    used = [segment.treatment for segment in segments]

    starts = np.flatnonzero(np.diff(group, prepend=-1))
    bounds = np.append(starts, group.size)
    groups = group[starts]
    rule = candidates.rule[groups]
    has_rules = bool((rule != Rule.COUNT).any())
    top_k = np.clip(candidates.top_k, 0, vocab_size)

    def of_each(needed: bool | np.bool_, values: Array) -> Array | None:
        return values[request] if needed else None

    return Arrangement(
        num_candidates=request.size,
        segments=segments,
        largest_top_k=int(top_k.max()),
        fields=CandidateFields(
            position=position,
            seed=candidates.seed[request],
            step=candidates.step[request],
            group=np.repeat(np.arange(starts.size), np.diff(bounds)),
            first=bounds,
            quota=candidates.quota[groups],
            rule=rule if has_rules else None,
            bound=candidates.bound[groups] if has_rules else None,
            probability=candidates.probability[request[starts]]
            if (candidates.probability < 1).any()
            else None,
            order=order,
            unconditional=unconditional,
            temperature=of_each(any(t.sampled for t in used), candidates.temperature),
            top_p=of_each(any(t.top_p for t in used), candidates.top_p),
            top_k=of_each(any(t.top_k for t in used), top_k),
            alg_temp=of_each((candidates.alg_temp > 0).any(), candidates.alg_temp),
            cfg_scale=of_each(any(t.guided for t in used), candidates.cfg_scale),
            last_if_end=of_each(
                candidates.confidence_eos_eot_inf.any(), candidates.confidence_eos_eot_inf
            ),
        ),
    )


def upload(host: CandidateFields[Array], device: torch.device) -> CandidateFields[Tensor]:
    """Copy all fields to `device` in one transfer."""
    arrays: dict[str, Array] = {}
    for field in fields(host):
        array = getattr(host, field.name)
        if array is not None:
            arrays[field.name] = array
    kinds = [_TENSOR_KINDS[array.dtype.kind] for array in arrays.values()]
    words = [
        array.astype(sent).view(np.int64)
        for array, (sent, _) in zip(arrays.values(), kinds, strict=True)
    ]
    parts = to_device(np.concatenate(words), device).split([array.size for array in words])
    return CandidateFields(
        **{
            name: part.bool() if dtype == torch.bool else part.view(dtype)
            for name, part, (_, dtype) in zip(arrays, parts, kinds, strict=True)
        }
    )


def _decoding_order(codes: Array, group: Array, position: Array) -> Array | None:
    """Indices that sort by (code, group, position); None where the candidates are so already."""
    next_group = group[1:] > group[:-1]
    in_order = (codes[1:] > codes[:-1]) | (
        (codes[1:] == codes[:-1])
        & (next_group | ((group[1:] == group[:-1]) & (position[1:] > position[:-1])))
    )
    return None if in_order.all() else np.lexsort((position, group, codes))
