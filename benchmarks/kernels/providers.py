"""Ways to attend: ours and its peers, in the order of the table."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.attention import SDPBackend

from benchmarks.kernels import dense_providers, sparse_providers
from benchmarks.kernels.cases import Case
from benchmarks.kernels.dense_providers import Run
from benchmarks.kernels.inputs import Inputs
from benchmarks.measuring.rows import reason

Absence = Callable[[str], str]
"""Takes a device; says why a provider is not there at all, "" where it is."""

Refusal = Callable[[Case, str], str]
"""Takes a case and a device; says why a provider does not serve that case, "" where it does."""


def _cuda(device: str) -> str:
    return "" if device == "cuda" else "needs a CUDA device"


def _cpu(device: str) -> str:
    return "" if device == "cpu" else "needs a CPU"


def _module(name: str, least_capability: tuple[int, int] = (8, 0)) -> Absence:
    """A CUDA package that has to be importable, and a chip that it has kernels for."""

    def absent(device: str) -> str:
        if _cuda(device):
            return _cuda(device)
        if torch.cuda.get_device_capability() < least_capability:
            return "needs compute capability {}.{}".format(*least_capability)
        try:
            importlib.import_module(name)
        except Exception as problem:
            # Packages fail to import in many ways: what they say is what the table tells.
            return f"cannot be imported: {reason(problem)}"
        return ""

    return absent


def _xformers(device: str) -> str:
    absence = _module("xformers.ops")(device)
    if not absence:
        # It imports without its extension, and then has no operator.
        library = importlib.import_module("xformers._cpp_lib")
        problem = getattr(library, "_cpp_library_load_exception", None)
        if problem is not None:
            versions = " ".join(str(problem).split())[:160]
            absence = f"cannot load its extension: {versions}"
    return absence


def _not_in_float32(case: Case, device: str) -> str:
    return "not in float32" if case.dtype == torch.float32 and device == "cuda" else ""


def _cudnn(case: Case, device: str) -> str:
    return _not_in_float32(case, device) or ("" if case.head_dim <= 128 else "head_dim above 128")


def _flash_attention_4(case: Case, device: str) -> str:
    fits = case.block_size == 128 and case.head_dim == 128
    return _not_in_float32(case, device) or (
        "" if fits else "its tiles need blocks of 128 and head_dim 128"
    )


def _compiled_flex(device: str) -> str:
    return "not compiled it ignores lists of full blocks" if device == "cpu" else ""


def _flex_full_blocks(case: Case, device: str) -> str:
    return _not_in_float32(case, device) or (
        "blocks below its tiles" if case.block_size < 32 else ""
    )


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to attend.

    Attributes:
        make: prepares inputs and returns what is timed.
        sparse: whether it leaves out the blocks that are not kept.
        absent: why it is not there on a device, whatever the case.
        refusal: why it does not serve a case.
        compiles: whether it compiles for every shape, which takes seconds.
    """

    make: Callable[[Inputs], Run]
    sparse: bool
    absent: Absence = lambda device: ""
    refusal: Refusal = lambda case, device: ""
    compiles: bool = False


ON_CPU: Final = "PyTorch on CPU, dense"
PROVIDERS: Final = {
    "ours": Provider(sparse_providers.ours, sparse=True),
    "FlashAttention 3, dense": Provider(
        dense_providers.flash_attention_3,
        False,
        _module("vllm.vllm_flash_attn", (9, 0)),
        _not_in_float32,
    ),
    "FlashAttention 4, block-sparse": Provider(
        sparse_providers.flash_attention_4,
        True,
        _module("vllm.vllm_flash_attn.cute.interface", (9, 0)),
        _flash_attention_4,
    ),
    "FlashAttention 2, dense": Provider(
        dense_providers.sdpa(SDPBackend.FLASH_ATTENTION), False, _cuda, _not_in_float32
    ),
    "cuDNN, dense": Provider(
        dense_providers.sdpa(SDPBackend.CUDNN_ATTENTION), False, _cuda, _cudnn
    ),
    "xformers, dense": Provider(
        dense_providers.xformers_attention, False, _xformers, _not_in_float32
    ),
    ON_CPU: Provider(dense_providers.sdpa(None), False, _cpu),
    "FlexAttention, as released": Provider(
        sparse_providers.flex_attention_as_released, True, refusal=_not_in_float32, compiles=True
    ),
    "FlexAttention, full blocks": Provider(
        sparse_providers.flex_attention_full_blocks,
        True,
        _compiled_flex,
        _flex_full_blocks,
        compiles=True,
    ),
}
