"""Counter-based random numbers: a value depends on its coordinates alone.

They are the same on every device, in any batch, and after a preempted request starts again, so a
seed reproduces a request's output however it was scheduled.
"""

from enum import IntEnum

from torch import Tensor

from vllm_sparsed.kernels.counter_random import uniform_rows


class Stream(IntEnum):
    """What a random number is for; different streams are independent."""

    CANDIDATE = 0
    RANDOM_ORDER = 1
    ORDER_NOISE = 2
    ORIGIN = 3


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
    return uniform_rows(seed, step, position, int(stream), columns)


def gumbel(uniforms: Tensor) -> Tensor:
    """Return standard Gumbel noise, -log(-log u), for `uniforms` in (0, 1)."""
    return uniforms.log().neg_().log_().neg_()
