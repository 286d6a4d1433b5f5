"""Copies from the host that do not wait for the device."""

from typing import Any

import numpy as np
import torch


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """A tensor with the array's content on `device`; asynchronous on CUDA, shared on CPUs."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
