"""The random numbers in Python's own integers."""

from typing import Final

from vllm_sparsed.kernels.counter_random.configs import INCREMENT, MULTIPLIER_1, MULTIPLIER_2

_MODULUS: Final = 1 << 64


def uniform_reference(
    seed: int, step: int, position: int, stream: int, column: int | None = None
) -> float:
    """The number in (0, 1) at these coordinates, to each of which the finaliser of SplitMix64 is
    applied."""
    key = _mix(seed + (stream + 1) * INCREMENT)
    for coordinate in (step, position, 1 if column is None else column + 1):
        key = _mix(key + coordinate * INCREMENT)
    return ((key >> 12) + 0.5) * 2.0**-52


def _mix(state: int) -> int:
    state %= _MODULUS
    state = (state ^ (state >> 30)) * MULTIPLIER_1 % _MODULUS
    state = (state ^ (state >> 27)) * MULTIPLIER_2 % _MODULUS
    return state ^ (state >> 31)
