"""Costs of the attention kernels by compute capability, head dimension and dtype.

`python -m benchmarks.kernels.crossover` measures a device and prints its entry.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch

from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4
from vllm_sparsed.planning.crossover import AttentionCosts, FlashAttention4Range, KernelCost

MEASURED: Final[Mapping[tuple[tuple[int, int], int], AttentionCosts]] = MappingProxyType(
    {
        ((9, 0), 128): AttentionCosts(
            dense=KernelCost(65.6, 0.065, 632.0),
            sparse={
                16: KernelCost(72.5, 1.03, 120.0),
                32: KernelCost(112.0, 0.409, 265.0),
                64: KernelCost(85.7, 0.198, 517.0),
                128: KernelCost(89.2, 0.257, 609.0),
            },
            build={
                16: KernelCost(281.0, 0.444, 373.0),
                32: KernelCost(308.0, 0.535, 481.0),
                64: KernelCost(256.0, 0.67, 522.0),
                128: KernelCost(232.0, 0.55, 524.0),
            },
            # Blocks of 16 were not measured there: as much slower as blocks of 32.
            long_rates={16: 88.7, 32: 196.0, 64: 405.0},
        ),
    }
)
"""By compute capability and head dimension, in bfloat16, against FlashAttention 3 (one H100).

`long_rates` are for models in which every query head has keys of its own, see LONG_SHARED."""

LONG_SHARED: Final[Mapping[tuple[tuple[int, int], int], Mapping[int, Mapping[int, float]]]] = (
    MappingProxyType({((9, 0), 128): {7: {16: 111.0, 32: 245.0, 64: 474.0}}})
)
"""`long_rates` where query heads share keys, which are then fetched less often (rates fall by 8%
instead of a quarter), by query heads per key head. A ratio that was not measured has the rates of
the next smaller one that was, `MEASURED`'s of 1 at least: 4 (iLLaDA) has those of 1, with which a
request rather stays dense."""

PORTABLE: Final = AttentionCosts(
    dense=KernelCost(77.1, 0.417, 365.0),
    sparse={
        16: KernelCost(72.5, 1.03, 120.0),
        32: KernelCost(76.9, 1.03, 190.0),
        64: KernelCost(76.9, 0.375, 208.0),
        128: KernelCost(76.1, 0.477, 373.0),
    },
    build={
        16: KernelCost(354.0, 1.18, 279.0),
        32: KernelCost(354.0, 1.18, 359.0),
        64: KernelCost(354.0, 1.18, 441.0),
        128: KernelCost(348.0, 0.392, 442.0),
    },
)
"""The kernels and tiles of compute capability 8.0 with head_dim 128, against FlashAttention 2, on
the same card. Blocks of 16 and 32 were not measured in that run: sparse rates are those that the
same tiles had in others; building is as much slower than with 64 as a first fit of `MEASURED`
made it."""

FLASH_ATTENTION_4: Final[Mapping[tuple[tuple[int, int], int, int], FlashAttention4Range]] = (
    MappingProxyType(
        {
            ((9, 0), 128, 1): FlashAttention4Range(
                KernelCost(160.0, 0.248, 678.0), 128, 4096, 65536
            ),
            ((9, 0), 128, 7): FlashAttention4Range(
                KernelCost(140.0, 0.198, 666.0), 128, 4096, 65536
            ),
        }
    )
)
"""By compute capability, head dimension and query heads per key head, against `MEASURED`.

`python -m benchmarks.kernels.flash_attention_4` measures a device and prints its entries. A request
takes this kernel by its own length alone, or its result would depend on the batch it runs in.
Measured so on one NVIDIA H100 80GB HBM3 (PyTorch 2.11.0+cu130, Triton 3.6.0, vLLM 0.32.0): the
command demands a gain of 2% at every share of blocks, which ends at 16,384 tokens; up to 65,536 it
was faster in every case still, by 0.8 to 5.9%. Other lengths and ratios have not been measured.
"""

UNMEASURED_SLOWDOWN: Final = 2.0
"""How much slower than `PORTABLE` sparse attention and pattern building are taken to be, against
dense attention, where nothing was measured: other chips, head dimensions and float32."""


def attention_costs(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    heads_per_kv_head: int = 1,
    fa4: FlashAttention4Range | None = None,
) -> AttentionCosts:
    """What was measured, or careful assumptions where nothing was.

    Args:
        heads_per_kv_head: query heads that share a key head, in the whole model.
        fa4: FlashAttention 4, where it is taken for some sequences.
    """
    measured = MEASURED.get((capability, head_dim))
    if measured is not None and dtype in (torch.bfloat16, torch.float16):
        by_ratio = {1: measured.long_rates, **LONG_SHARED.get((capability, head_dim), {})}
        ratio = max(ratio for ratio in by_ratio if ratio <= heads_per_kv_head)
        return replace(measured, long_rates=by_ratio[ratio], fa4=fa4)
    return AttentionCosts(
        dense=PORTABLE.dense,
        sparse={block: _slower(cost) for block, cost in PORTABLE.sparse.items()},
        build={block: _slower(cost) for block, cost in PORTABLE.build.items()},
        # In float32 dense attention is PyTorch's, which hands no log-sum-exp to pattern building.
        lse_given=dtype != torch.float32,
        fa4=fa4,
    )


def fa4_range(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    heads_per_kv_head: int,
    installed: bool,
) -> FlashAttention4Range | None:
    """FlashAttention 4, where it is installed, serves these dimensions and was measured.

    Args:
        heads_per_kv_head: query heads that share a key head, in the whole model.
        installed: `flash_attention_4.installed()`, as found when the engine was configured.
    """
    fa4 = FLASH_ATTENTION_4.get((capability, head_dim, heads_per_kv_head))
    if fa4 is None or not installed:
        return None
    served = flash_attention_4.serves(head_dim, dtype, fa4.block_size, capability)
    return fa4 if served else None


def _slower(cost: KernelCost) -> KernelCost:
    return replace(
        cost, row_ns=cost.row_ns * UNMEASURED_SLOWDOWN, rate=cost.rate / UNMEASURED_SLOWDOWN
    )
