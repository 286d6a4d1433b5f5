"""Dense attention of the backend: values and memory, with and without grouped heads."""

from itertools import pairwise

import pytest
import torch
from vllm.v1.attention.backend import AttentionType

from vllm_sparsed.attention.implementation import SparsedAttentionImpl
from vllm_sparsed.attention.metadata import SparsedMetadata

HEADS, HEAD_SIZE = 14, 64


def attend(
    lengths: list[int], kv_heads: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Attention over random sequences, and its inputs."""
    torch.manual_seed(0)
    total = sum(lengths)
    q, k, v = (
        torch.randn(total, heads, HEAD_SIZE, dtype=dtype, device=device)
        for heads in (HEADS, kv_heads, kv_heads)
    )
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).tolist()
    metadata = SparsedMetadata(
        num_tokens=total,
        dense_bounds=tuple(pairwise(ends)),
        dense_start_loc=torch.tensor(ends, dtype=torch.int32, device=device),
        max_dense_len=max(lengths),
        builds=(),
        tiles=(),
        store=None,
    )
    impl = SparsedAttentionImpl(
        HEADS, HEAD_SIZE, 0.1, kv_heads, attn_type=AttentionType.ENCODER_ONLY
    )
    output = torch.empty_like(q)
    impl._attend_densely(q, k, v, metadata, output)
    return output, (q, k, v)


@pytest.mark.parametrize("kv_heads", [14, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values(kv_heads: int, dtype: torch.dtype) -> None:
    """Query head h attends with key head h // (heads / key heads)."""
    lengths = [5, 64, 31]
    output, (q, k, v) = attend(lengths, kv_heads, dtype, "cpu")
    start = 0
    for length in lengths:
        span = slice(start, start + length)
        for head in range(HEADS):
            of_head = head // (HEADS // kv_heads)
            scores = 0.1 * q[span, head].double() @ k[span, of_head].double().T
            expected = scores.softmax(1) @ v[span, of_head].double()
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(
                output[span, head].double(), expected, atol=tolerance, rtol=tolerance
            )
        start += length


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [14, 2])
def test_memory_does_not_grow_with_the_square_of_the_length(kv_heads: int) -> None:
    length = 8192
    attend([128], kv_heads, torch.float32, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend([length], kv_heads, torch.float32, "cuda")
    taken = torch.cuda.max_memory_allocated() - before
    inputs = 4 * length * HEAD_SIZE * (2 * HEADS + 2 * kv_heads)
    print(f"{kv_heads} key heads: {taken / 2**20:.0f} MiB, inputs {inputs / 2**20:.0f} MiB")
    # The scores of all heads would be 3.5 GiB.
    assert taken < 6 * inputs + 64 * 2**20
