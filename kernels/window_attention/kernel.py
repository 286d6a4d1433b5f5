"""Attention of windows over paged keys in Triton: split over keys, then combined."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_sparsed.kernels.online_softmax import add_tile, scaled_exp2
from vllm_sparsed.kernels.window_attention import window_tiles

FIRST_ROW = tl.constexpr(window_tiles.Field.FIRST_ROW)
NUM_ROWS = tl.constexpr(window_tiles.Field.NUM_ROWS)
SEQ_LEN = tl.constexpr(window_tiles.Field.SEQ_LEN)
SEQUENCE = tl.constexpr(window_tiles.Field.SEQUENCE)
PATTERN_ROW = tl.constexpr(window_tiles.Field.PATTERN_ROW)
FIRST_TOUCHED = tl.constexpr(window_tiles.Field.FIRST_TOUCHED)
NUM_TOUCHED = tl.constexpr(window_tiles.Field.NUM_TOUCHED)
SPLIT_KEYS = tl.constexpr(window_tiles.Field.SPLIT_KEYS)
NUM_SPLITS = tl.constexpr(window_tiles.Field.NUM_SPLITS)

TILE_ROWS = tl.constexpr(window_tiles.TILE_ROWS)

_LIST_CHUNK = tl.constexpr(512)


@triton.jit
def _widen(x, dtype: tl.constexpr, FP8: tl.constexpr):
    """Elements of a page in the dtype of the queries; FP8 is "", "native" or "bits"."""
    if FP8 == "bits":
        # e4m3 in the bits of float16 is 2**8 too small. Its one pattern for NaN would be 480.
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        wide = (bits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
        x = tl.where((x & 0x7F) == 0x7F, float("nan"), wide)
    elif FP8 == "native":
        x = x.to(tl.float16)
    return x.to(dtype)


@triton.jit
def _split_list(list_ptr, count, first_touched, num_touched):
    """How many listed blocks lie before the touched ones, and how many do not lie behind them."""
    before = count * 0
    not_behind = count * 0
    column = tl.arange(0, _LIST_CHUNK)
    for first in range(0, count, _LIST_CHUNK):
        listed = first + column < count
        block = tl.load(list_ptr + first + column, mask=listed, other=0).to(tl.int32)
        before += tl.sum((listed & (block < first_touched)).to(tl.int32), 0)
        not_behind += tl.sum((listed & (block < first_touched + num_touched)).to(tl.int32), 0)
    return before, not_behind


@triton.jit
def _kept_block(i, mask, list_ptr, before, not_behind, first_touched, num_touched):
    """The i-th of the kept blocks, ascending: the list, with the touched blocks in their place."""
    touched = (i >= before) & (i < before + num_touched)
    position = tl.where(i < before, i, i - before - num_touched + not_behind)
    listed = tl.load(list_ptr + position, mask=mask & (touched == 0), other=0).to(tl.int32)
    return tl.where(touched, first_touched + i - before, listed)


@triton.jit
def _attend_tile(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] float32
    row_max,  # [BLOCK_M] float32, of the unscaled scores
    row_sum,  # [BLOCK_M] float32
    first_key,  # first of the tile's keys, counted along the kept blocks
    num_keys,
    kept,  # the kept blocks: list, two positions in it, the touched blocks
    table_ptr,
    k_ptr,
    v_ptr,
    stride_k_page,
    stride_k_token,
    stride_v_page,
    stride_v_token,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of BLOCK_N kept keys to the running softmax."""
    list_ptr, before, not_behind, first_touched, num_touched = kept
    ZERO: tl.constexpr = 0 if FP8 == "bits" else 0.0
    column = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, q.shape[1])
    inside = first_key + column < num_keys
    if BLOCK_N > BLOCK_SIZE:
        # The tile gathers several key blocks.
        key = first_key + column
        block = _kept_block(
            key // BLOCK_SIZE, inside, list_ptr, before, not_behind, first_touched, num_touched
        )
        token = block * BLOCK_SIZE + key % BLOCK_SIZE  # [BLOCK_N]
        page = tl.load(table_ptr + token // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        row = token % PAGE_SIZE
    else:
        block = _kept_block(
            first_key // BLOCK_SIZE, True,
            list_ptr, before, not_behind, first_touched, num_touched,
        )  # fmt: skip
        token = block * BLOCK_SIZE + first_key % BLOCK_SIZE
        page = tl.load(table_ptr + token // PAGE_SIZE).to(tl.int64)
        row = token % PAGE_SIZE + column
    k_rows = k_ptr + page * stride_k_page + row * stride_k_token
    v_rows = v_ptr + page * stride_v_page + row * stride_v_token
    k_ptrs = k_rows[None, :] + dim[:, None]  # [BLOCK_D, BLOCK_N]
    v_ptrs = v_rows[:, None] + dim[None, :]  # [BLOCK_N, BLOCK_D]
    if MASKED:
        k = tl.load(k_ptrs, mask=inside[None, :] & (dim < HEAD_DIM)[:, None], other=ZERO)
        v = tl.load(v_ptrs, mask=inside[:, None] & (dim < HEAD_DIM)[None, :], other=ZERO)
    elif q.shape[1] > HEAD_DIM:
        k = tl.load(k_ptrs, mask=(dim < HEAD_DIM)[:, None], other=ZERO)
        v = tl.load(v_ptrs, mask=(dim < HEAD_DIM)[None, :], other=ZERO)
    else:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    return add_tile(
        q,
        _widen(k, q.dtype, FP8),
        _widen(v, q.dtype, FP8),
        acc,
        row_max,
        row_sum,
        inside,
        scale_log2,
        MASKED,
        PRECISION,
    )


# Their alignment and divisibility change from call to call, and no vector load depends on them.
_UNSPECIALIZED = [
    "stride_indices_row",
    "stride_indices_head",
    "stride_counts_row",
    "stride_counts_head",
    "stride_table",
    "num_tiles",
    "heads_per_kv",
]
_UNALIGNED = ["indices_ptr", "counts_ptr", "table_ptr", "tiles_ptr", "k_scale_ptr", "v_scale_ptr"]


@triton.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def window_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,  # float32 [num_tiles, num_heads, splits, TILE_ROWS, BLOCK_D]
    statistics_ptr,  # float32 [num_tiles, num_heads, splits, 2, TILE_ROWS]: maxima, then sums
    indices_ptr,
    counts_ptr,
    table_ptr,
    tiles_ptr,  # int32 [fields, num_tiles]
    k_scale_ptr,
    v_scale_ptr,
    stride_q_row,
    stride_q_head,
    stride_k_page,
    stride_k_token,
    stride_k_head,
    stride_v_page,
    stride_v_token,
    stride_v_head,
    stride_out_row,
    stride_out_head,
    stride_indices_row,
    stride_indices_head,
    stride_counts_row,
    stride_counts_head,
    stride_table,
    num_tiles,
    heads_per_kv,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M rows of one tile and one head against one split of their kept keys.

    Grid: (num_tiles * TILE_ROWS / BLOCK_M, num_heads, splits). Tiles vary fastest, then heads:
    programs that run at the same time share pages in the L2 cache.
    """
    PARTS: tl.constexpr = TILE_ROWS // BLOCK_M
    tile = tl.program_id(0) // PARTS
    first = tl.program_id(0) % PARTS * BLOCK_M
    head = tl.program_id(1)
    split = tl.program_id(2)
    tiles_ptr += tile
    num_rows = tl.load(tiles_ptr + NUM_ROWS * num_tiles)
    num_splits = tl.load(tiles_ptr + NUM_SPLITS * num_tiles)
    # Tiles that pad a CUDA graph have no rows.
    if (first >= num_rows) | (split >= num_splits):
        return
    first_row = tl.load(tiles_ptr + FIRST_ROW * num_tiles).to(tl.int64)
    seq_len = tl.load(tiles_ptr + SEQ_LEN * num_tiles)
    sequence = tl.load(tiles_ptr + SEQUENCE * num_tiles).to(tl.int64)
    pattern_row = tl.load(tiles_ptr + PATTERN_ROW * num_tiles).to(tl.int64)
    first_touched = tl.load(tiles_ptr + FIRST_TOUCHED * num_tiles)
    num_touched = tl.load(tiles_ptr + NUM_TOUCHED * num_tiles)
    split_keys = tl.load(tiles_ptr + SPLIT_KEYS * num_tiles)

    row = first + tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    row_mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    packed_row = (first_row + row)[:, None]
    q = tl.load(
        q_ptr + packed_row * stride_q_row + head * stride_q_head + dim[None, :],
        mask=row_mask,
        other=0.0,
    )

    # Without a pattern the tile touches all blocks, and its list is empty.
    list_ptr = indices_ptr + pattern_row * stride_indices_row + head * stride_indices_head
    count = tl.load(
        counts_ptr + pattern_row * stride_counts_row + head * stride_counts_head,
        mask=pattern_row >= 0,
        other=0,
    )
    before, not_behind = _split_list(list_ptr, count, first_touched, num_touched)
    num_blocks = before + num_touched + count - not_behind
    kept = (list_ptr, before, not_behind, first_touched, num_touched)
    # Kept blocks ascend, so only the last one can reach beyond the sequence: with its missing
    # tokens left off, kept keys are numbered without a hole.
    last_block = _kept_block(
        num_blocks - 1, True, list_ptr, before, not_behind, first_touched, num_touched
    )
    num_keys = num_blocks * BLOCK_SIZE - tl.maximum((last_block + 1) * BLOCK_SIZE - seq_len, 0)
    first_key = split * split_keys
    # The last split takes what is left, should a list be longer than the splits were made for.
    end_key = tl.where(split + 1 < num_splits, first_key + split_keys, num_keys)
    end_key = tl.minimum(num_keys, end_key)
    end_of_full = first_key + tl.maximum(end_key - first_key, 0) // BLOCK_N * BLOCK_N

    kv_head = head // heads_per_kv
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head
    table_ptr += sequence * stride_table
    if FP8 != "":
        scale_log2 *= tl.load(k_scale_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for key in range(first_key, end_of_full, BLOCK_N):
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, key, end_key, kept, table_ptr, k_ptr, v_ptr,
            stride_k_page, stride_k_token, stride_v_page, stride_v_token, scale_log2,
            HEAD_DIM, BLOCK_SIZE, PAGE_SIZE, BLOCK_N, FP8, False, PRECISION,
        )  # fmt: skip
    if end_of_full < end_key:
        acc, row_max, row_sum = _attend_tile(
            q, acc, row_max, row_sum, end_of_full, end_key, kept, table_ptr, k_ptr, v_ptr,
            stride_k_page, stride_k_token, stride_v_page, stride_v_token, scale_log2,
            HEAD_DIM, BLOCK_SIZE, PAGE_SIZE, BLOCK_N, FP8, True, PRECISION,
        )  # fmt: skip

    if num_splits == 1:
        acc = acc / row_sum[:, None]
        if FP8 != "":
            acc *= tl.load(v_scale_ptr)
        tl.store(
            out_ptr + packed_row * stride_out_row + head * stride_out_head + dim[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=row_mask,
        )
    else:
        part = (tile.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(2) + split
        statistics = statistics_ptr + part * (2 * TILE_ROWS) + row
        # A split behind the last key has a maximum of -inf: nobody reads its partial result.
        tl.store(statistics, row_max)
        tl.store(statistics + TILE_ROWS, row_sum)
        if first_key < end_key:
            partial = partial_ptr + part * (TILE_ROWS * BLOCK_D)
            tl.store(partial + row[:, None] * BLOCK_D + dim[None, :], acc, mask=row_mask)


@triton.jit(
    do_not_specialize=["num_tiles", "max_splits"],
    do_not_specialize_on_alignment=["tiles_ptr", "k_scale_ptr", "v_scale_ptr"],
)
def combine_splits(
    partial_ptr,  # float32 [num_tiles, num_heads, max_splits, TILE_ROWS, BLOCK_D]
    statistics_ptr,  # float32 [num_tiles, num_heads, max_splits, 2, TILE_ROWS]
    out_ptr,
    tiles_ptr,  # int32 [fields, num_tiles]
    k_scale_ptr,
    v_scale_ptr,
    stride_out_row,
    stride_out_head,
    num_tiles,
    max_splits,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the results of ROWS rows of one tile and one head from those of their splits.

    Grid: (num_tiles * TILE_ROWS / ROWS, num_heads).
    """
    PARTS: tl.constexpr = TILE_ROWS // ROWS
    tile = tl.program_id(0) // PARTS
    first = tl.program_id(0) % PARTS * ROWS
    head = tl.program_id(1)
    tiles_ptr += tile
    num_rows = tl.load(tiles_ptr + NUM_ROWS * num_tiles)
    num_splits = tl.load(tiles_ptr + NUM_SPLITS * num_tiles)
    if (num_splits == 1) | (first >= num_rows):
        return
    row = first + tl.arange(0, ROWS)
    first_row = tl.load(tiles_ptr + FIRST_ROW * num_tiles).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    row_mask = (row < num_rows)[:, None] & (dim < HEAD_DIM)[None, :]
    if FP8 != "":
        scale_log2 *= tl.load(k_scale_ptr)
    part = (tile.to(tl.int64) * tl.num_programs(1) + head) * max_splits
    statistics = statistics_ptr + part * (2 * TILE_ROWS) + row
    partial = partial_ptr + part * (TILE_ROWS * BLOCK_D) + row[:, None] * BLOCK_D + dim[None, :]

    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    for split in range(num_splits):
        row_max = tl.maximum(row_max, tl.load(statistics + split * (2 * TILE_ROWS)))
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    for split in range(num_splits):
        split_max = tl.load(statistics + split * (2 * TILE_ROWS))
        split_sum = tl.load(statistics + split * (2 * TILE_ROWS) + TILE_ROWS)
        written = row_mask & (split_max > float("-inf"))[:, None]
        added = tl.load(partial + split * (TILE_ROWS * BLOCK_D), mask=written, other=0.0)
        weight = scaled_exp2(split_max - row_max, scale_log2, PRECISION)
        acc += added * weight[:, None]
        row_sum += split_sum * weight
    acc = acc / row_sum[:, None]
    if FP8 != "":
        acc *= tl.load(v_scale_ptr)
    tl.store(
        out_ptr + (first_row + row)[:, None] * stride_out_row + head * stride_out_head
        + dim[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask,
    )  # fmt: skip
