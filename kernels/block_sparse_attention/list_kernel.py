"""Triton kernel that gathers one request's index lists from the pattern store."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_rows", "width", "stride_slot", "stride_slot_head", "stride_count"],
    do_not_specialize_on_alignment=["indices_ptr", "counts_ptr", "pattern_rows_ptr"],
)
def gather_lists_kernel(
    indices_ptr,  # int16 or int32 [pattern rows, num_heads, store width]
    counts_ptr,  # int32 [pattern rows, num_heads]
    pattern_rows_ptr,  # int32 or int64 [num_rows]
    out_indices_ptr,  # int32 [num_heads, num_rows, width], contiguous
    out_counts_ptr,  # int32 [2, num_heads, num_rows], contiguous
    num_rows,
    width,
    stride_slot,
    stride_slot_head,
    stride_count,
    stride_count_head,
    PADDED_WIDTH: tl.constexpr,
):
    """One query block of one head; what lies behind the end of its list stays as it was."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(pattern_rows_ptr + row).to(tl.int64)
    count = tl.load(counts_ptr + slot * stride_count + head * stride_count_head)
    target = head * num_rows + row
    tl.store(out_counts_ptr + target, 0)
    tl.store(out_counts_ptr + tl.num_programs(1) * num_rows + target, count)
    columns = tl.arange(0, PADDED_WIDTH)
    kept = columns < count
    source = indices_ptr + slot * stride_slot + head * stride_slot_head
    blocks = tl.load(source + columns, mask=kept, other=0)
    tl.store(out_indices_ptr + target * width + columns, blocks.to(tl.int32), mask=kept)
