"""Constants of SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014), and the kernel's tile."""

from typing import Final

INCREMENT: Final = 0x9E3779B97F4A7C15
MULTIPLIER_1: Final = 0xBF58476D1CE4E5B9
MULTIPLIER_2: Final = 0x94D049BB133111EB

BLOCK: Final = 128


def signed(value: int) -> int:
    """`value` modulo 2^64, as the int64 of the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def stream_key(stream: int) -> int:
    """What a stream adds to every seed, as a signed 64-bit number."""
    return signed((stream + 1) * INCREMENT)
