"""The tensors inside attention metadata, whatever the backend's class of metadata is."""

import copy
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def describe(metadata: Any, device: torch.device) -> tuple[Hashable, list[torch.Tensor]]:
    """What the host sees of metadata, and its tensors on the device in a fixed order.

    Where the host sees the same of two batches, it launches the same kernels with the same
    arguments, but for the tensors' addresses. Tensors elsewhere count with their content; objects
    that are neither dataclasses, lists, tuples nor plain values count by identity, so they must
    outlive what is done with the description.
    """
    tensors: list[torch.Tensor] = []

    def visit(value: Any) -> Hashable:
        if isinstance(value, torch.Tensor):
            layout = (torch.Tensor, tuple(value.shape), value.stride(), value.dtype)
            if value.device.type != device.type:
                return (*layout, value.numpy().tobytes())
            tensors.append(value)
            return layout
        if _is_record(value):
            parts = tuple(visit(getattr(value, field.name)) for field in fields(value))
            return (type(value), parts)
        if isinstance(value, list | tuple):
            return (type(value), tuple(visit(item) for item in value))
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            # With its type: True equals 1.
            return (type(value), value)
        return (type(value), id(value))

    return visit(metadata), tensors


def copy_tensors(
    metadata: Any, device: torch.device, copy_one: Callable[[torch.Tensor], torch.Tensor]
) -> Any:
    """The same metadata with a copy of each tensor on the device; all else is shared."""
    if isinstance(metadata, torch.Tensor):
        return copy_one(metadata) if metadata.device.type == device.type else metadata
    if _is_record(metadata):
        result = copy.copy(metadata)
        for field in fields(metadata):
            value = copy_tensors(getattr(metadata, field.name), device, copy_one)
            # Also where the class is frozen.
            object.__setattr__(result, field.name, value)
        return result
    if isinstance(metadata, list | tuple):
        return type(metadata)(copy_tensors(item, device, copy_one) for item in metadata)
    return metadata


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)
