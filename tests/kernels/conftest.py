"""Fixtures of the kernel tests: where they run, and poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

_POISONED = ("empty", "empty_like", "empty_strided")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """CUDA for tests marked `gpu`, otherwise the CPU, where kernels run in Triton's interpreter."""
    if request.node.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.fail("tests marked gpu need a CUDA device")
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("start pytest with TRITON_INTERPRET=1, or with -m gpu on a CUDA device")
    return "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN or the lowest integer, so that reading what nobody wrote shows."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            if x.dtype.is_floating_point:
                x.fill_(float("nan"))
            elif x.dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
                x.fill_(torch.iinfo(x.dtype).min)
            return x

        return wrapper

    for name in _POISONED:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
