"""Block-sparse attention forward in Triton, for every supported chip, dtype and shape."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsed.kernels.online_softmax import add_tile


@triton.jit
def _attend_tile(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] float32
    row_max,  # [BLOCK_M] float32, of the unscaled scores
    row_sum,  # [BLOCK_M] float32
    first_key,  # first of the tile's keys, counted along the row's kept blocks
    num_keys,  # kept keys of the row
    list_ptr,
    k_ptr,
    v_ptr,
    stride_k_token,
    stride_v_token,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of BLOCK_N kept keys to the running softmax."""
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    if BLOCK_N > BLOCK_SIZE:
        # The tile gathers several key blocks.
        kept = first_key + column
        if MASKED:
            block = tl.load(list_ptr + kept // BLOCK_SIZE, mask=kept < num_keys, other=0)
        else:
            block = tl.load(list_ptr + kept // BLOCK_SIZE)
        token = block.to(tl.int64) * BLOCK_SIZE + kept % BLOCK_SIZE  # [BLOCK_N]
        k_rows = k_ptr + token * stride_k_token
        v_rows = v_ptr + token * stride_v_token
    else:
        block = tl.load(list_ptr + first_key // BLOCK_SIZE).to(tl.int64)
        first_token = block * BLOCK_SIZE + first_key % BLOCK_SIZE
        k_rows = k_ptr + first_token * stride_k_token + column * stride_k_token
        v_rows = v_ptr + first_token * stride_v_token + column * stride_v_token
    k_ptrs = k_rows[None, :] + dim[:, None]  # [BLOCK_D, BLOCK_N]
    v_ptrs = v_rows[:, None] + dim[None, :]  # [BLOCK_N, BLOCK_D]
    inside = first_key + column < num_keys
    if MASKED:
        k = tl.load(k_ptrs, mask=inside[None, :] & (dim < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif BLOCK_D > HEAD_DIM:
        k = tl.load(k_ptrs, mask=(dim < HEAD_DIM)[:, None], other=0.0)
        v = tl.load(v_ptrs, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    return add_tile(q, k, v, acc, row_max, row_sum, inside, scale_log2, MASKED, PRECISION)


# Their alignment and divisibility change from call to call, and no vector load depends on them.
_UNSPECIALIZED = [
    "stride_indices_row",
    "stride_indices_head",
    "stride_counts_row",
    "stride_counts_head",
    "heads_per_kv",
]
_UNALIGNED = [
    "indices_ptr",
    "counts_ptr",
    "seq_start_ptr",
    "seq_len_ptr",
    "query_block_ptr",
    "pattern_row_ptr",
]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def block_sparse_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    indices_ptr,
    counts_ptr,
    seq_start_ptr,
    seq_len_ptr,
    query_block_ptr,
    pattern_row_ptr,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_out_token,
    stride_out_head,
    stride_indices_row,
    stride_indices_head,
    stride_counts_row,
    stride_counts_head,
    scale_log2,
    heads_per_kv,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one pattern row and one head against the row's kept keys.

    Grid: (num_rows * BLOCK_SIZE / BLOCK_M, num_heads). Rows vary fastest, so that programs running
    at the same time share the keys of a head in the L2 cache.
    """
    TILES_PER_ROW: tl.constexpr = BLOCK_SIZE // BLOCK_M
    row = tl.program_id(0) // TILES_PER_ROW
    head = tl.program_id(1)
    seq_start = tl.load(seq_start_ptr + row).to(tl.int64)
    seq_len = tl.load(seq_len_ptr + row)
    query_block = tl.load(query_block_ptr + row)
    pattern_row = tl.load(pattern_row_ptr + row).to(tl.int64)

    first_query = query_block * BLOCK_SIZE + tl.program_id(0) % TILES_PER_ROW * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    query_mask = (query < seq_len)[:, None] & (dim < HEAD_DIM)[None, :]
    query_token = (seq_start + query)[:, None]
    q = tl.load(
        q_ptr + query_token * stride_q_token + head * stride_q_head + dim[None, :],
        mask=query_mask,
        other=0.0,
    )

    kv_head = head // heads_per_kv
    k_ptr += seq_start * stride_k_token + kv_head * stride_k_head
    v_ptr += seq_start * stride_v_token + kv_head * stride_v_head
    list_ptr = indices_ptr + pattern_row * stride_indices_row + head * stride_indices_head
    count = tl.load(counts_ptr + pattern_row * stride_counts_row + head * stride_counts_head)
    # Lists ascend, so only the last kept block can reach beyond the request: with its missing
    # tokens left off, kept keys are numbered without a hole.
    last_block = tl.load(list_ptr + count - 1, mask=count > 0, other=0).to(tl.int32)
    num_keys = count * BLOCK_SIZE - tl.maximum((last_block + 1) * BLOCK_SIZE - seq_len, 0)
    num_keys = tl.where(count > 0, num_keys, 0)
    if first_query >= seq_len:
        num_keys = 0
    full_keys = num_keys // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first_key in range(0, full_keys, BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, first_key, num_keys, list_ptr, k_ptr, v_ptr,
            stride_k_token, stride_v_token, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    if full_keys < num_keys:
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, full_keys, num_keys, list_ptr, k_ptr, v_ptr,
            stride_k_token, stride_v_token, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, True, PRECISION,
        )  # fmt: skip

    # A row without kept keys has a sum of 0: its output is defined as 0.
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    tl.store(
        out_ptr + query_token * stride_out_token + head * stride_out_head + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=query_mask,
    )
