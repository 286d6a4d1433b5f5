"""Measures the steps of the plain PyTorch loops, after checking them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.measuring.timing import synchronize
from benchmarks.reference.models import ReferenceModel
from benchmarks.reference.sparse_pattern import SparseSettings, token_mask
from benchmarks.requests.plain_loop import SparseAttention, denoise
from benchmarks.requests.plain_model import PlainModel, dense_attention
from benchmarks.requests.step_times import StepTimes

ALLOWED_ERROR: Final = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""Largest error of one layer's logits, relative to their norm, that passes the check."""


class WrongLogitsError(RuntimeError):
    """Logits are further from the plain reference than rounding explains."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What to measure of a request.

    Attributes:
        length: tokens of prompt and canvas.
        canvas: tokens to generate.
        settings: SparseD's parameters.
        dense_steps: dense steps to time, after one that warms up.
        sparse_steps: sparse steps to time, after one that warms up or compiles.
        pattern_layers: layers whose patterns the building step of the plain loop builds; 0: all.
    """

    length: int
    canvas: int
    settings: SparseSettings
    dense_steps: int = 2
    sparse_steps: int = 2
    pattern_layers: int = 0


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    difference = (result.float() - expected.float()).norm()
    return float(difference / expected.float().norm())


def check_plain(model: PlainModel, settings: SparseSettings) -> float:
    """Compare one layer, dense and sparse, with the reference on a few hundred tokens.

    Returns:
        The larger relative error.

    Raises:
        WrongLogitsError: it is too large.
    """
    weights = model.weights
    some = weights["model.embed_tokens.weight"]
    dims = replace(model.dimensions, num_layers=1)
    reference, plain = ReferenceModel(dims, weights), PlainModel(dims, weights)
    length = 4 * settings.block_size + settings.block_size // 3
    tokens = torch.arange(10, 10 + length, device=some.device) % len(some)
    attention = SparseAttention(settings.block_size, settings)
    with torch.no_grad():
        dense = plain.logits(tokens, attention.dense_and_build)
        sparse = plain.logits(tokens, attention.sparse)
        masks = [token_mask(attention.patterns[0], length, settings.block_size)]
        errors = [
            relative_error(dense, reference.logits(tokens)[0]),
            relative_error(sparse, reference.logits(tokens, masks)[0]),
        ]
    if not max(errors) <= ALLOWED_ERROR[some.dtype]:
        raise WrongLogitsError(f"relative error of dense and sparse logits {errors}")
    return max(errors)


class PlainRequest:
    """Times the steps of one request in the plain loops: first the dense ones, then the sparse."""

    def __init__(self, model: PlainModel, what: Measurement) -> None:
        """Draw a prompt.

        Args:
            model: one that passed `check_plain`.
            what: the request.
        """
        self._what = what
        embedding = model.weights["model.embed_tokens.weight"]
        generator = torch.Generator(embedding.device).manual_seed(what.length)
        highest = min(1000, len(embedding) - 10)
        tokens = torch.randint(
            10, highest, (what.length,), generator=generator, device=embedding.device
        )
        prompt_len = what.length - what.canvas
        tokens[prompt_len:] = model.dimensions.mask_token_id
        steps = what.dense_steps + what.sparse_steps + 3
        self._loop = _TimedLoop(model, tokens, prompt_len, -(-what.canvas // steps))
        self._dense: list[float] = []

    def dense(self) -> StepTimes:
        """The dense steps."""
        self._loop.step(dense_attention)
        self._dense = [self._loop.step(dense_attention) for _ in range(self._what.dense_steps)]
        times = StepTimes(note=sdpa_backend(self._loop.model))
        times.add("dense", self._dense)
        return times

    def sparse(self) -> StepTimes:
        """The dense steps that were measured before, the building and the sparse ones."""
        times = StepTimes()
        times.add("dense", self._dense)
        layers = self._loop.model.dimensions.num_layers
        built = min(self._what.pattern_layers or layers, layers)
        attention = SparseAttention(self._what.canvas, self._what.settings, measured_layers=built)
        dense = times.median("dense")
        building = max(0.0, self._loop.step(attention.dense_and_build) - dense)
        times.add("building", [dense + building * layers / built])
        first = self._loop.step(attention.sparse)
        steps = range(self._what.sparse_steps)
        times.add("sparse", [self._loop.step(attention.sparse) for _ in steps])
        kept = sum(pattern.sum(dtype=torch.int64).item() for pattern in attention.patterns)
        times.density = kept / sum(pattern.numel() for pattern in attention.patterns)
        times.note = f"first sparse step, compilation included, {first:.1f} s, not counted"
        if built < layers:
            times.note += f"; building step scaled from the patterns of {built} of {layers} layers"
        return times


def sdpa_backend(model: PlainModel) -> str:
    """Which of its kernels PyTorch picks for dense attention, as a table's note."""
    dims, weight = model.dimensions, model.weights["model.norm.weight"]
    if weight.device.type == "cpu":
        return ""
    x = torch.empty(1, dims.num_heads, 128, dims.head_dim, dtype=weight.dtype, device=weight.device)
    return f"SDPA runs {SDPBackend(torch._fused_sdp_choice(x, x, x)).name}"


@dataclass
class _TimedLoop:
    model: PlainModel
    tokens: Tensor
    prompt_len: int
    unmasked: int

    def step(self, attend: Any) -> float:
        """Seconds of one step, tokens included."""
        device = self.tokens.device.type
        synchronize(device)
        started = time.perf_counter()
        self.tokens = denoise(self.model, self.tokens, self.prompt_len, self.unmasked, attend)
        synchronize(device)
        return time.perf_counter() - started
