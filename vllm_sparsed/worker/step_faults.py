"""Keeps what fails for one request in a step from the other requests of its batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from vllm_sparsed.logger import init_logger

logger = init_logger(__name__)

_SHOWN_CHARACTERS = 500

Item = TypeVar("Item")
Result = TypeVar("Result")


class DeviceLostError(RuntimeError):
    """The device does not work any more: no request can go on."""


@dataclass(slots=True)
class Outcome(Generic[Result]):
    """Results and errors, by index into the items."""

    results: dict[int, Result] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def run_apart_where_it_fails(
    items: Sequence[Item],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    undo: Callable[[Sequence[Item]], None],
    device: torch.device,
    one_rank: bool,
) -> Outcome[Result]:
    """Run all items at once; if that fails, each of them alone, and say which fail even then.

    Args:
        run: returns one result per item; changes nothing that `undo` does not take back.
        undo: takes back what a failed run has begun.
        device: that the run uses.
        one_rank: whether nobody else takes part. Where others do, what fails here for want of
            memory does not fail there, and they would wait for ever.

    Raises:
        DeviceLostError: the device cannot be used any more.
        Exception: of a device that is used together with other ranks.
    """
    outcome: Outcome[Result] = Outcome()
    message = _attempt(items, range(len(items)), run, undo, device, one_rank, outcome)
    if message is None:
        return outcome
    if len(items) == 1:
        outcome.errors[0] = message
        return outcome
    logger.warning("A batch of %d requests failed and is run one by one: %s", len(items), message)
    for i in range(len(items)):
        message = _attempt([items[i]], [i], run, undo, device, one_rank, outcome)
        if message is not None:
            outcome.errors[i] = message
    return outcome


def _attempt(
    items: Sequence[Item],
    indices: Sequence[int],
    run: Callable[[Sequence[Item]], Sequence[Result]],
    undo: Callable[[Sequence[Item]], None],
    device: torch.device,
    one_rank: bool,
    outcome: Outcome[Result],
) -> str | None:
    """Run items once.

    Returns:
        What failed; None: nothing did, and the results are in `outcome`.
    """
    try:
        outcome.results.update(zip(indices, run(items), strict=True))
        return None
    except Exception as error:
        if not _works(device):
            raise DeviceLostError(
                f"The device {device} failed in a denoising step of {len(items)} requests and "
                f"cannot be used any more: {describe(error)}. Start the server again; if that "
                "repeats itself, look at the driver's log (dmesg, Xid)."
            ) from error
        if not one_rank and _of_device(error):
            raise
        message = describe(error)
        logger.debug("A denoising step failed", exc_info=True)
    # Behind the handler: the error's frames hold the tensors of the failed run.
    undo(items)
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    return message


def describe(error: Exception) -> str:
    """One line for the client and the log."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    return f"{type(error).__name__}: {text}"[:_SHOWN_CHARACTERS]


def _of_device(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or any(
        name in str(error) for name in ("CUDA", "NCCL")
    )


def _works(device: torch.device) -> bool:
    """Whether the device still computes; after most of its errors it does not."""
    if device.type == "cpu":
        return True
    try:
        torch.accelerator.synchronize()
        return bool(torch.ones(1, device=device).item() == 1)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
