"""What a worker says when its memory is too small."""

import contextlib
from collections.abc import Iterator
from typing import Final

import torch

ADVICE: Final = (
    "Lower --max-model-len and --max-num-batched-tokens, raise --gpu-memory-utilization, add "
    "--tensor-parallel-size or --quantization fp8, or make the pattern store smaller "
    "(sparsed.select, sparsed.max_canvas, a larger sparsed.block_size)."
)


class StartupError(RuntimeError):
    """The configuration cannot run on this machine; says what to change."""


@contextlib.contextmanager
def fits_in_memory(what: str) -> Iterator[None]:
    """Say what to change where the block runs out of memory.

    Raises:
        StartupError: it did; names `what` as that which does not fit.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise StartupError(f"{what} does not fit in memory. {ADVICE}") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise StartupError(f"{what} does not fit in memory. {ADVICE}") from error
