"""Measures the steps of the plain PyTorch loops, after checking them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.measuring.timing import synchronize
from benchmarks.reference.models import Dimensions, ReferenceModel
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
        sparse_steps: sparse steps to time, after one that compiles.
        pattern_layers: layers whose patterns the building step of the plain loop builds; 0: all.
    """

    length: int
    canvas: int
    settings: SparseSettings
    dense_steps: int = 2
    sparse_steps: int = 2
    pattern_layers: int = 2


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


def measure_plain(
    config: dict[str, Any], weights: dict[str, Tensor], what: Measurement, sparse: bool
) -> StepTimes:
    """Time the steps of one loop.

    Args:
        config: config.json of the model.
        weights: random ones of its shape.
        what: the request.
        sparse: whether to run SparseD, else dense steps alone.

    Raises:
        WrongLogitsError: the model fails its check.
    """
    model = PlainModel(Dimensions.from_config(config), weights)
    check_plain(model, what.settings)
    device = weights["model.norm.weight"].device
    generator = torch.Generator(device).manual_seed(what.length)
    highest = min(1000, config["vocab_size"] - 10)
    tokens = torch.randint(10, highest, (what.length,), generator=generator, device=device)
    prompt_len = what.length - what.canvas
    tokens[prompt_len:] = model.dimensions.mask_token_id
    steps = what.dense_steps + what.sparse_steps + 3
    loop = _TimedLoop(model, tokens, prompt_len, -(-what.canvas // steps))

    times = StepTimes()
    loop.step(dense_attention)
    times.add("dense", [loop.step(dense_attention) for _ in range(what.dense_steps)])
    if not sparse:
        return times
    layers = model.dimensions.num_layers
    built = min(what.pattern_layers or layers, layers)
    attention = SparseAttention(what.canvas, what.settings, measured_layers=built)
    dense = times.median("dense")
    building = max(0.0, loop.step(attention.dense_and_build) - dense)
    times.add("building", [dense + building * layers / built])
    first = loop.step(attention.sparse)
    times.add("sparse", [loop.step(attention.sparse) for _ in range(what.sparse_steps)])
    kept = sum(pattern.sum(dtype=torch.int64).item() for pattern in attention.patterns)
    times.density = kept / sum(pattern.numel() for pattern in attention.patterns)
    times.note = (
        f"building step from the patterns of {built} of {layers} layers; first sparse step, "
        f"compilation included, {first:.1f} s, not counted"
    )
    return times


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
