"""Block-sparse attention: ours and its peers. A maker takes inputs and returns what is timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from benchmarks.kernels.dense_providers import Run, with_repeated_keys
from vllm_sparsed.kernels.block_sparse_attention import QueryTiles, block_sparse_attention

if TYPE_CHECKING:
    from benchmarks.kernels.inputs import Inputs

RELEASED_FLEX_BLOCK: Final = 128
"""FlexAttention's own block size, which the released SparseD code leaves as it is."""

RECOMPILE_LIMIT: Final = 1000
"""PyTorch runs a function uncompiled after 8 shapes: FlexAttention would then need L x L memory."""


def ours(x: Inputs) -> Run:
    """This package's kernel, over all requests at once."""
    case = x.case
    rows, first = [], 0
    for length in case.lengths:
        rows.append(range(first, first + length // case.block_size))
        first = rows[-1].stop
    tiles = QueryTiles.build(x.starts, list(case.lengths), rows, case.block_size, x.q.device)
    out = torch.empty(x.q.shape, dtype=case.dtype, device=x.q.device)
    return lambda: block_sparse_attention(
        x.q, x.k, x.v, x.indices, x.counts, tiles, scale=x.scale, out=out
    )


def flex_attention_as_released(x: Inputs) -> Run:
    """FlexAttention as the released SparseD code calls it.

    Its blocks have 128 tokens whatever the pattern's have; every block of which anything is kept
    is masked element by element, from a table of the pattern's blocks.
    """
    kept, block_size = x.block_map, x.case.block_size

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return kept[head, query // block_size, key // block_size]

    coarse = pooled(kept, max(1, RELEASED_FLEX_BLOCK // block_size))
    counts, indices = block_lists(coarse)
    return _flex(x, (counts, indices), None, max(RELEASED_FLEX_BLOCK, block_size), mask_mod, {})


def flex_attention_full_blocks(x: Inputs) -> Run:
    """FlexAttention told that every kept block is kept whole, so that it masks nothing."""
    counts, indices = block_lists(x.block_map)
    nothing = (torch.zeros_like(counts), torch.zeros_like(indices))
    options: dict[str, Any] = {}
    if x.case.block_size < 128:
        # Its default tiles are larger than these blocks.
        options = {"BLOCK_M": x.case.block_size, "BLOCK_N": x.case.block_size, "num_warps": 4}
    return _flex(x, nothing, (counts, indices), x.case.block_size, None, options)


def _flex(
    x: Inputs,
    masked: tuple[Tensor, Tensor],
    full: tuple[Tensor, Tensor] | None,
    block_size: int,
    mask_mod: Any,
    options: dict[str, Any],
) -> Run:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    tokens = x.case.num_tokens
    full_counts, full_indices = full or (None, None)
    mask = BlockMask.from_kv_blocks(
        *masked,
        full_counts,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
        compute_q_blocks=False,
    )
    q, k, v = (y.transpose(0, 1)[None].contiguous() for y in with_repeated_keys(x))
    attend: Any = flex_attention
    if x.device == "cuda":
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
        torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
        attend = torch.compile(flex_attention, dynamic=False)

    def run() -> Tensor:
        out: Tensor = attend(
            q, k, v, block_mask=mask, scale=x.scale, kernel_options=options or None
        )
        return out[0].transpose(0, 1)

    return run


def flash_attention_4(x: Inputs) -> Run:
    """FlashAttention 4's block-sparse forward as vLLM ships it, all requests as one sequence."""
    from vllm.vllm_flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from vllm.vllm_flash_attn.cute.interface import _flash_attn_fwd

    counts, indices = block_lists(x.block_map)
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=torch.zeros_like(indices),
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=(x.case.block_size, x.case.block_size),
    )
    q, k, v = (y[None].contiguous() for y in (x.q, x.k, x.v))

    def run() -> Tensor:
        out: Tensor = _flash_attn_fwd(
            q, k, v, softmax_scale=x.scale, causal=False, block_sparse_tensors=tensors
        )[0]
        return out[0]

    return run


def block_lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """The lists that FlexAttention and FlashAttention 4 read.

    Args:
        kept: bool [num_heads, rows, columns].

    Returns:
        Counts int32 [1, num_heads, rows]; ascending kept columns and behind them the others,
        int32 [1, num_heads, rows, columns].
    """
    indices = torch.empty(kept.shape, dtype=torch.int32, device=kept.device)
    for head in range(kept.shape[0]):
        indices[head] = torch.argsort((~kept[head]).int(), dim=-1, stable=True)
    return kept.sum(dim=-1, dtype=torch.int32)[None], indices[None]


def pooled(kept: Tensor, factor: int) -> Tensor:
    """bool [num_heads, rows / factor, columns / factor], rounded up: whether anything is kept."""
    heads, rows, columns = kept.shape
    down, right = -rows % factor, -columns % factor
    padded = torch.nn.functional.pad(kept, (0, right, 0, down))
    tiles = padded.view(heads, (rows + down) // factor, factor, (columns + right) // factor, factor)
    return tiles.any(dim=4).any(dim=2)
