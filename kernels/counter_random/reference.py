"""The random numbers in Python's own integers."""

from typing import Final

INCREMENT: Final = 0x9E3779B97F4A7C15
_MULTIPLIER_1: Final = 0xBF58476D1CE4E5B9
_MULTIPLIER_2: Final = 0x94D049BB133111EB
_MODULUS: Final = 1 << 64


def uniform_reference(
    seed: int, step: int, position: int, stream: int, column: int | None = None
) -> float:
    """The number in (0, 1) at these coordinates, to each of which the finaliser of SplitMix64 is
    applied (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)."""
    key = _mix(seed + (stream + 1) * INCREMENT)
    for coordinate in (step, position, 1 if column is None else column + 1):
        key = _mix(key + coordinate * INCREMENT)
    return ((key >> 12) + 0.5) * 2.0**-52


def _mix(state: int) -> int:
    state %= _MODULUS
    state = (state ^ (state >> 30)) * _MULTIPLIER_1 % _MODULUS
    state = (state ^ (state >> 27)) * _MULTIPLIER_2 % _MODULUS
    return state ^ (state >> 31)
