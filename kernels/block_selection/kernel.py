"""Triton kernel of the selection: exact top-k by bisection on the bits, then compaction."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _top_mask(scores_ptr, num_columns, num_kept, WIDTH: tl.constexpr):
    """Mask [WIDTH] of a row's num_kept highest scores; the lowest index first among equals."""
    columns = tl.arange(0, WIDTH)
    scores = tl.load(scores_ptr + columns, mask=columns < num_columns, other=0.0)
    # Floats that are not negative order like their bits; columns outside never win.
    keys = tl.maximum(scores.to(tl.int32, bitcast=True), 0)
    keys = tl.where(columns < num_columns, keys, -1)
    # The num_kept-th highest key: the largest value that at least num_kept keys reach.
    threshold = num_kept * 0
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        reached = tl.sum((keys >= candidate).to(tl.int32), 0)
        threshold = tl.where(reached >= num_kept, candidate, threshold)
    above = keys > threshold
    equal = (keys == threshold).to(tl.int32)
    needed = num_kept - tl.sum(above.to(tl.int32), 0)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= needed))


@triton.jit(
    do_not_specialize=[
        "num_blocks",
        "first_generation_block",
        "num_kept",
        "num_kept_generation",
        "stride_slot",
        "stride_slot_head",
        "stride_count",
    ],
    do_not_specialize_on_alignment=["indices_ptr", "counts_ptr", "pattern_rows_ptr"],
)
def select_blocks_kernel(
    importance_ptr,  # float32 [num_heads, n, n], contiguous
    generation_ptr,  # float32 [num_heads, n, ng], contiguous
    pattern_rows_ptr,  # int32 or int64 [n]
    indices_ptr,  # int16 or int32 [pattern rows, num_heads, width]
    counts_ptr,  # int32 [pattern rows, num_heads]
    num_blocks,
    first_generation_block,
    num_kept,
    num_kept_generation,
    stride_slot,
    stride_slot_head,
    stride_count,
    WIDTH: tl.constexpr,
):
    """One query block of one head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    num_generation = num_blocks - first_generation_block
    map_row = head.to(tl.int64) * num_blocks + row
    slot = tl.load(pattern_rows_ptr + row).to(tl.int64)
    target = indices_ptr + slot * stride_slot + head * stride_slot_head
    columns = tl.arange(0, WIDTH)

    keep = _top_mask(importance_ptr + map_row * num_blocks, num_blocks, num_kept, WIDTH)
    keep = (keep & (columns < first_generation_block)).to(tl.int32)
    position = tl.cumsum(keep, 0) - 1
    tl.store(target + position, columns.to(indices_ptr.dtype.element_ty), mask=keep > 0)
    count = tl.sum(keep, 0)

    keep = _top_mask(
        generation_ptr + map_row * num_generation, num_generation, num_kept_generation, WIDTH
    ).to(tl.int32)
    position = count + tl.cumsum(keep, 0) - 1
    block = columns + first_generation_block
    tl.store(target + position, block.to(indices_ptr.dtype.element_ty), mask=keep > 0)
    tl.store(counts_ptr + slot * stride_count + head, count + num_kept_generation)
