"""The tokens of a forward pass, at one place of the device's memory in every step."""

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from vllm_sparsed.worker.packing import PackedBatch

_MAX_PASSES: Final = 2
"""Passes of one step: the second has the guidance sequences that did not fit into the first."""


class TokenBuffer:
    """Copies tokens to the device without waiting for it.

    Attributes:
        token_ids: int32 [max_tokens] on the device.
    """

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.token_ids = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        # Page-locked memory, of each pass for itself: the copy of the first may still be under way
        # when the second is packed. On a CPU the buffer itself.
        self._host = [self.token_ids] * _MAX_PASSES
        if device.type != "cpu":
            self._host = [
                torch.zeros(max_tokens, dtype=torch.int32, pin_memory=True)
                for _ in range(_MAX_PASSES)
            ]
        self._arrays: list[npt.NDArray[np.int32]] = [host.numpy() for host in self._host]

    def fill(self, batch: PackedBatch, pass_index: int) -> None:
        """Copy a batch's tokens to the front; the step before must have been waited for."""
        batch.write_token_ids(self._arrays[pass_index][: batch.num_tokens])
        host = self._host[pass_index]
        if host is not self.token_ids:
            self.token_ids[: batch.num_tokens].copy_(host[: batch.num_tokens], non_blocking=True)
