"""vLLM's paged store of keys and values, as the SPARSED backend writes and reads it."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

PAGE_SIZE: Final = 128
"""Tokens of a page: a block of a pattern is a page or a fixed part of one."""

NO_SLOT: Final = -1
"""Slot of a token that is not stored."""

_FP8: Final = torch.float8_e4m3fn


def page_slots(pages: Sequence[int], start: int, end: int) -> npt.NDArray[np.int64]:
    """Slots of tokens [start, end) of a sequence, int64 [tokens]; NO_SLOT without pages.

    Args:
        pages: of the sequence, in order; empty: nothing of it is stored.
    """
    if not pages:
        return np.full(end - start, NO_SLOT, dtype=np.int64)
    positions = np.arange(start, end, dtype=np.int64)
    return np.asarray(pages, dtype=np.int64)[positions // PAGE_SIZE] * PAGE_SIZE + (
        positions % PAGE_SIZE
    )


def split_pages(kv_cache: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [pages, page size, heads, head_size], of one layer's store.

    Args:
        kv_cache: [pages, heads, page size, 2 * head_size], as vLLM binds it to a layer; bytes where
            it holds fp8 values.
    """
    if kv_cache.dtype == torch.uint8:
        kv_cache = kv_cache.view(_FP8)
    keys, values = kv_cache.transpose(1, 2).split(head_size, dim=-1)
    return keys, values


def store_rows(
    layer: Any,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    kv_cache_dtype: str,
) -> None:
    """Write keys and values [tokens, heads, head_size] to their slots; NO_SLOT is not written.

    Args:
        layer: has the scales of fp8 values, `_k_scale` and `_v_scale`.
        slots: int64 [tokens] on the device.
        kv_cache_dtype: vLLM's name of what is stored.
    """
    keys, values = kv_cache.transpose(1, 2).split(key.shape[-1], dim=-1)
    if key.is_cuda:
        from vllm._custom_ops import reshape_and_cache_flash

        reshape_and_cache_flash(
            key, value, keys, values, slots, kv_cache_dtype, layer._k_scale, layer._v_scale
        )
        return
    rows = (slots >= 0).nonzero()[:, 0]
    slots = slots[rows]
    page, offset = slots // PAGE_SIZE, slots % PAGE_SIZE
    stored_keys, stored_values = split_pages(kv_cache, key.shape[-1])
    for stored, new, scale in (
        (stored_keys, key, layer._k_scale),
        (stored_values, value, layer._v_scale),
    ):
        chosen = new[rows]
        if stored.dtype == _FP8:
            limit = torch.finfo(_FP8).max
            chosen = (chosen.float() / scale).clamp(-limit, limit).to(_FP8)
            # PyTorch writes no fp8 by index on CPUs.
            stored.view(torch.uint8)[page, offset] = chosen.view(torch.uint8)
        else:
            stored[page, offset] = chosen
