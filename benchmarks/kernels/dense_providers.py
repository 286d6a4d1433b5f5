"""Dense attention to compare with. A maker takes inputs and returns what is timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from benchmarks.kernels.inputs import Inputs

Run = Callable[[], Tensor]
"""Returns [tokens, num_heads, head_dim]."""


def flash_attention_3(x: Inputs) -> Run:
    """vLLM's, over all requests at once."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    bounds = torch.tensor([*x.starts, x.case.num_tokens], dtype=torch.int32, device="cuda")
    longest = max(x.case.lengths)

    def run() -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            x.q,
            x.k,
            x.v,
            max_seqlen_q=longest,
            cu_seqlens_q=bounds,
            max_seqlen_k=longest,
            cu_seqlens_k=bounds,
            softmax_scale=x.scale,
            fa_version=3,
        )
        return out

    return run


def sdpa(backend: SDPBackend | None) -> Callable[[Inputs], Run]:
    """PyTorch's, one call for each request; None: the backend that PyTorch picks."""

    def make(x: Inputs) -> Run:
        requests = [[y[span][None] for y in with_repeated_keys(x)] for span in x.spans]
        requests = [[y.transpose(1, 2).contiguous() for y in request] for request in requests]

        def attend() -> Tensor:
            outs = [
                F.scaled_dot_product_attention(q, k, v, scale=x.scale)[0].transpose(0, 1)
                for q, k, v in requests
            ]
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        if backend is None:
            return attend

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return attend()

        return run

    return make


def xformers_attention(x: Inputs) -> Run:
    """xformers' attention by the operator that it picks, over all requests at once."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    q, k, v = (y[None].contiguous() for y in with_repeated_keys(x))
    lengths = list(x.case.lengths)
    bias = BlockDiagonalMask.from_seqlens(lengths) if len(lengths) > 1 else None

    def run() -> Tensor:
        out: Tensor = memory_efficient_attention(q, k, v, attn_bias=bias, scale=x.scale)
        return out[0]

    return run


def with_repeated_keys(x: Inputs) -> list[Tensor]:
    """q, k, v [tokens, num_heads, head_dim], the keys repeated where queries share them."""
    repeats = x.case.num_heads // x.case.num_kv_heads
    return [x.q, x.k.repeat_interleave(repeats, 1), x.v.repeat_interleave(repeats, 1)]
