"""Confidence intervals, 95%: of a share, and of the difference of two shares of the same cases."""

import math
from typing import Final

CONFIDENCE_Z: Final = 1.959964  # standard deviations of a two-sided interval of 95%


def wilson_interval(correct: int, asked: int) -> tuple[float, float]:
    """Bounds of a share (E. B. Wilson, 1927).

    Raises:
        ValueError: nothing was asked.
    """
    if asked < 1:
        raise ValueError("asked must be at least 1")
    share, z = correct / asked, CONFIDENCE_Z
    middle = share + z * z / (2 * asked)
    spread = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    scale = 1 + z * z / asked
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def paired_difference(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Bounds of the difference of two shares of the same cases: (gained - lost) / cases.

    Method 10 of R. G. Newcombe, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17 (1998).

    Args:
        both: cases that both got right.
        gained: those that only the new one got right.
        lost: those that only the old one got right.
        neither: those that neither got right.

    Raises:
        ValueError: there are no cases.
    """
    cases = both + gained + lost + neither
    new, old = both + gained, both + lost
    low_new, high_new = wilson_interval(new, cases)
    low_old, high_old = wilson_interval(old, cases)
    correlation = 0.0
    product = new * (cases - new) * old * (cases - old)
    if product:
        excess = both * neither - gained * lost
        # Continuity correction, for a positive correlation alone.
        excess_corrected = max(excess - cases / 2, 0.0) if excess > 0 else excess
        correlation = excess_corrected / math.sqrt(product)
    share_new, share_old = new / cases, old / cases
    difference = share_new - share_old

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    low = difference - distance(share_new - low_new, high_old - share_old)
    high = difference + distance(high_new - share_new, share_old - low_old)
    return low, high
