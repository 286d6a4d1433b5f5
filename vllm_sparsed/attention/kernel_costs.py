"""Costs of the attention kernels by compute capability, head dimension and dtype.

`python -m benchmarks.kernels.crossover` measures a device and prints its entry.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

import torch

from vllm_sparsed.attention.crossover import AttentionCosts, KernelCost, PeerKernel
from vllm_sparsed.kernels.block_sparse_attention import flash_attention_4

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
                16: KernelCost(281.0, 0.444, 396.0),
                32: KernelCost(308.0, 0.692, 510.0),
                64: KernelCost(256.0, 1.27, 626.0),
                128: KernelCost(232.0, 0.73, 564.0),
            },
        ),
    }
)
"""By compute capability and head dimension, in bfloat16, against FlashAttention 3 (one H100)."""

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
same tiles had in others, building is as much slower than with 64 as it is in `MEASURED`."""

FLASH_ATTENTION_4: Final[Mapping[tuple[tuple[int, int], int, int], PeerKernel]] = MappingProxyType(
    {}
)
"""By compute capability, head dimension and query heads per key head, against `MEASURED`.

`python -m benchmarks.kernels.flash_attention_4` measures a device and prints its entries. A request
takes this kernel by its own length alone, or its result would depend on the batch it runs in.
Empty: it has been measured in the benchmarks' calls, not yet in the engine's, so it is not taken.
"""

UNMEASURED_SLOWDOWN: Final = 2.0
"""How much slower than `PORTABLE` sparse attention and pattern building are taken to be, against
dense attention, where nothing was measured: other chips, head dimensions and float32."""


def attention_costs(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    peer: PeerKernel | None = None,
) -> AttentionCosts:
    """What was measured, or careful assumptions where nothing was.

    Args:
        peer: FlashAttention 4, where it is taken for some sequences.
    """
    measured = MEASURED.get((capability, head_dim))
    if measured is not None and dtype in (torch.bfloat16, torch.float16):
        return replace(measured, peer=peer)
    return AttentionCosts(
        dense=PORTABLE.dense,
        sparse={block: _slower(cost) for block, cost in PORTABLE.sparse.items()},
        build={block: _slower(cost) for block, cost in PORTABLE.build.items()},
        # In float32 dense attention is PyTorch's, which hands no log-sum-exp to pattern building.
        lse_given=dtype != torch.float32,
        peer=peer,
    )


def peer_kernel(
    capability: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    heads_per_kv_head: int,
    installed: bool,
) -> PeerKernel | None:
    """FlashAttention 4, where it is installed, serves these dimensions and was measured.

    Args:
        heads_per_kv_head: query heads that share a key head, in the whole model.
        installed: `flash_attention_4.installed()`, as found when the engine was configured.
    """
    peer = FLASH_ATTENTION_4.get((capability, head_dim, heads_per_kv_head))
    if peer is None or not installed:
        return None
    served = flash_attention_4.serves(head_dim, dtype, peer.block_size, capability)
    return peer if served else None


def _slower(cost: KernelCost) -> KernelCost:
    return replace(
        cost, row_ns=cost.row_ns * UNMEASURED_SLOWDOWN, rate=cost.rate / UNMEASURED_SLOWDOWN
    )
