"""Counter-based random numbers: a value depends on its coordinates alone.

They are the same on every device, in any batch, and after a preempted request starts again, so a
seed reproduces a request's output however it was scheduled. The mixing function and the increment
are those of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014), in int64 arithmetic that wraps around.
"""

import os
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random import uniform_rows


class Stream(IntEnum):
    """What a random number is for; different streams are independent."""

    CANDIDATE = 0
    RANDOM_ORDER = 1
    ORDER_NOISE = 2
    ORIGIN = 3


def signed(value: int) -> int:
    """`value` modulo 2^64, as the int64 of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_INCREMENT: Final = signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1: Final = signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2: Final = signed(0x94D049BB133111EB)


def uniform(
    seed: Tensor, step: Tensor, position: Tensor, stream: Stream, columns: int | None = None
) -> Tensor:
    """Return uniform random numbers in the open interval (0, 1).

    Args:
        seed, step, position: int64 [rows], one coordinate triple per row.
        stream: what the numbers are for.
        columns: numbers of a row; None: one, without a column dimension.

    Returns:
        float64 [rows] or [rows, columns]; multiples of 2^-53, of which 52 bits are random.
    """
    if columns is None and (seed.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return uniform_rows(seed, step, position, int(stream))
    key = _mix(seed + signed((int(stream) + 1) * _INCREMENT))
    key = _mix(key.add_(step, alpha=_INCREMENT))
    key = _mix(key.add_(position, alpha=_INCREMENT))
    if columns is None:
        bits = _mix(key.add_(_INCREMENT))
    else:
        counter = torch.arange(1, columns + 1, dtype=torch.int64, device=key.device)
        bits = _mix(key[:, None] + counter * _INCREMENT)
    # 52 bits and a half: neither 0 nor, after rounding to float64, 1.
    return _logical_shift(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def gumbel(uniforms: Tensor) -> Tensor:
    """Return standard Gumbel noise, -log(-log u), for `uniforms` in (0, 1)."""
    return uniforms.log().neg_().log_().neg_()


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; works in place."""
    state.bitwise_xor_(_logical_shift(state, 30)).mul_(_MULTIPLIER_1)
    state.bitwise_xor_(_logical_shift(state, 27)).mul_(_MULTIPLIER_2)
    return state.bitwise_xor_(_logical_shift(state, 31))


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign.
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)
