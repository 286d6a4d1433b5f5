"""Which hardware and versions a figure belongs to."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import torch

COLUMNS: Final = ("device", "torch", "triton", "vllm", "python")
"""Keys of `environment`, the last columns of every table."""


def environment() -> dict[str, str]:
    """Device and versions; "-" for a package that is not installed."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "vllm": _version("vllm"),
        "python": platform.python_version(),
    }


def headline() -> str:
    """The same in one line."""
    found = environment()
    names = ", ".join(f"{name} {found[name]}" for name in COLUMNS[1:])
    return f"{found['device']}; {names}"


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        pass
    # PyTorch's own builds of Triton go by other distribution names.
    try:
        module = __import__(package)
    except ImportError:
        return "-"
    return str(getattr(module, "__version__", "-"))
