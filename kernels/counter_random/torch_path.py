"""The random numbers in PyTorch's int64 arithmetic, which wraps around."""

from typing import Final

import torch
from torch import Tensor

from vllm_sparsed.kernels.counter_random.configs import (
    INCREMENT,
    MULTIPLIER_1,
    MULTIPLIER_2,
    signed,
    stream_key,
)

_INCREMENT: Final = signed(INCREMENT)
_MULTIPLIER_1: Final = signed(MULTIPLIER_1)
_MULTIPLIER_2: Final = signed(MULTIPLIER_2)


def uniform_torch(
    seed: Tensor, step: Tensor, position: Tensor, stream: int, columns: int | None = None
) -> Tensor:
    """As `uniform_reference`: float64 [rows], or [rows, columns] with one more coordinate."""
    key = _mix(seed + stream_key(stream))
    key = _mix(key.add_(step, alpha=_INCREMENT))
    key = _mix(key.add_(position, alpha=_INCREMENT))
    if columns is None:
        bits = _mix(key.add_(_INCREMENT))
    else:
        counter = torch.arange(1, columns + 1, dtype=torch.int64, device=key.device)
        bits = _mix(key[:, None] + counter * _INCREMENT)
    # 52 bits and a half: neither 0 nor, after rounding to float64, 1.
    return _logical_shift(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64; works in place."""
    state.bitwise_xor_(_logical_shift(state, 30)).mul_(_MULTIPLIER_1)
    state.bitwise_xor_(_logical_shift(state, 27)).mul_(_MULTIPLIER_2)
    return state.bitwise_xor_(_logical_shift(state, 31))


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask clears the copies of the sign.
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)
