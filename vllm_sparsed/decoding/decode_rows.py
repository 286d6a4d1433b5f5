"""What the host knows of the rows of one step, arranged for one pass over the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from torch import Tensor

from vllm_sparsed.decoding import DECODERS
from vllm_sparsed.decoding.protocol import Decoder

# vLLM's own limit: a request below it is greedy.
_LEAST_TEMPERATURE: Final = 1e-5

_ALGORITHMS: Final = {name: index for index, name in enumerate(DECODERS)}
_DECODERS: Final = tuple(DECODERS.values())
_SHAPES_CONFIDENCE: Final = np.array([decoder.shapes_confidence for decoder in _DECODERS])

# By numpy's kind of dtype: what is sent in 64 bits, and what arrives.
_TENSOR_KINDS: Final = {
    "b": (np.int64, torch.bool),
    "i": (np.int64, torch.int64),
    "f": (np.float64, torch.float64),
}


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The masked rows that one step may unmask, R rows of B requests, as host arrays.

    Attributes:
        request: int32 [R], ascending index into the arrays of [B].
        position: int32 [R], position within the sequence; distinct within a request.
        algs: [B], names in `DECODERS`.
        temperature: float [B]; below 1e-5 the candidate is the argmax.
        top_p: float [B]; 1 or more: off.
        top_k: int [B]; 0 or less: off.
        alg_temp: float [B], temperature of the order of unmasking.
        seed: int64 [B].
        step: int [B], step of the whole request.
        num_to_unmask: int [B], most rows that are unmasked.
        unmask_probability: float [B], with which each of these is.
        cfg_scale: float [B], guidance; 0: none.
        logits_eos_inf: bool [B].
        confidence_eos_eot_inf: bool [B].
    """

    request: np.ndarray
    position: np.ndarray
    algs: tuple[str, ...]
    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    alg_temp: np.ndarray
    seed: np.ndarray
    step: np.ndarray
    num_to_unmask: np.ndarray
    unmask_probability: np.ndarray
    cfg_scale: np.ndarray
    logits_eos_inf: np.ndarray
    confidence_eos_eot_inf: np.ndarray


@dataclass(frozen=True, slots=True)
class Treatment:
    """What is done alike to a run of rows."""

    decoder: Decoder
    guided: bool
    sampled: bool
    top_p: bool
    top_k: bool
    without_eos: bool

    @property
    def cuts(self) -> bool:
        """Whether top_p or top_k take tokens out of the distribution."""
        return self.top_p or self.top_k


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end), in decoding order, of one treatment."""

    start: int
    end: int
    treatment: Treatment


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Rows in decoding order: guided ones first, those of one treatment and request together.

    Attributes:
        num_rows: R.
        segments: cover the rows in order.
        largest_top_k: largest top_k asked for, at most the vocabulary; 0 where none is.
        arrays: host arrays by name; see `arrange`.
    """

    num_rows: int
    segments: tuple[Segment, ...]
    largest_top_k: int
    arrays: Mapping[str, np.ndarray]


def arrange(rows: DecodeRows, vocab_size: int) -> DecodePlan:
    """Put the rows in decoding order and list what the device needs of them.

    Arrays always there: `position`, `seed`, `step`, `request` (ascending number of the row's
    request) and, one element per request in this order, `first_row` (one more: the number of rows)
    and `num_to_unmask`. There only where some row needs them: `order` (which of the given rows is
    at each place), `unconditional` (the guidance sequence's row for each guided row),
    `temperature`, `top_p`, `top_k`, `alg_temp`, `cfg_scale`, `last_if_end` and, one element per
    request, `unmask_probability`.

    Args:
        rows: at least one.
        vocab_size: top_k is clamped to it.
    """
    request = rows.request.astype(np.int64)
    position = rows.position.astype(np.int64)
    codes = _treatment_codes(rows)
    arrays: dict[str, np.ndarray] = {}
    order = _decoding_order(codes[request], request, position)
    if order is not None:
        guided = (rows.cfg_scale > 0)[request]
        if guided.any():
            arrays["unconditional"] = (np.cumsum(guided) - 1)[order[guided[order]]]
        request, position = request[order], position[order]
        arrays["order"] = order
    segments = _segments(codes[request])
    used = [segment.treatment for segment in segments]

    starts = np.flatnonzero(np.diff(request, prepend=-1))
    bounds = np.append(starts, request.size)
    requests = request[starts]
    top_k = np.clip(rows.top_k, 0, vocab_size)
    arrays["request"] = np.repeat(np.arange(starts.size), np.diff(bounds))
    arrays["first_row"] = bounds
    arrays["num_to_unmask"] = rows.num_to_unmask[requests]
    if (rows.unmask_probability < 1).any():
        arrays["unmask_probability"] = rows.unmask_probability[requests]
    arrays["position"] = position
    per_row = (
        ("seed", True, rows.seed),
        ("step", True, rows.step),
        ("temperature", any(treatment.sampled for treatment in used), rows.temperature),
        ("top_p", any(treatment.top_p for treatment in used), rows.top_p),
        ("top_k", any(treatment.top_k for treatment in used), top_k),
        ("alg_temp", (rows.alg_temp > 0).any(), rows.alg_temp),
        ("cfg_scale", any(treatment.guided for treatment in used), rows.cfg_scale),
        ("last_if_end", rows.confidence_eos_eot_inf.any(), rows.confidence_eos_eot_inf),
    )
    for name, needed, values in per_row:
        if needed:
            arrays[name] = values[request]
    return DecodePlan(
        num_rows=request.size,
        segments=segments,
        largest_top_k=int(top_k.max()),
        arrays=arrays,
    )


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Copy 1-D arrays to `device` in one transfer: bool, float64 or int64 tensors by name."""
    kinds = {name: _TENSOR_KINDS[array.dtype.kind] for name, array in arrays.items()}
    packed = torch.from_numpy(
        np.concatenate(
            [array.astype(kinds[name][0]).view(np.int64) for name, array in arrays.items()]
        )
    )
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([array.size for array in arrays.values()])
    tensors = {}
    for (name, (_, dtype)), part in zip(kinds.items(), parts, strict=True):
        tensors[name] = part.bool() if dtype == torch.bool else part.view(dtype)
    return tensors


def _treatment_codes(rows: DecodeRows) -> np.ndarray:
    """One number per request [B]: equal numbers, equal treatment; guided requests' are lowest."""
    algorithm = np.array([_ALGORITHMS[name] for name in rows.algs], dtype=np.int64)
    sampled = rows.temperature >= _LEAST_TEMPERATURE
    # Cutting the tail off does not move the argmax.
    cut = sampled | _SHAPES_CONFIDENCE[algorithm]
    codes = np.where(rows.cfg_scale > 0, 0, len(_DECODERS)) + algorithm
    for flag in (sampled, cut & (rows.top_p < 1), cut & (rows.top_k > 0), rows.logits_eos_inf):
        codes = codes * 2 + flag
    return codes


def _treatment(code: int) -> Treatment:
    """Read a number of `_treatment_codes`."""
    unguided, algorithm = divmod(code >> 4, len(_DECODERS))
    return Treatment(
        decoder=_DECODERS[algorithm],
        guided=not unguided,
        sampled=bool(code & 8),
        top_p=bool(code & 4),
        top_k=bool(code & 2),
        without_eos=bool(code & 1),
    )


def _decoding_order(
    codes: np.ndarray, request: np.ndarray, position: np.ndarray
) -> np.ndarray | None:
    """Indices that sort by (code, request, position); None where the rows are so already."""
    next_request = request[1:] > request[:-1]
    in_order = (codes[1:] > codes[:-1]) | (
        (codes[1:] == codes[:-1])
        & (next_request | ((request[1:] == request[:-1]) & (position[1:] > position[:-1])))
    )
    return None if in_order.all() else np.lexsort((position, request, codes))


def _segments(codes: np.ndarray) -> tuple[Segment, ...]:
    bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), codes.size]
    return tuple(
        Segment(start, end, _treatment(int(codes[start]))) for start, end in pairwise(bounds)
    )
