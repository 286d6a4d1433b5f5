"""Triton kernel of the decision: each row counts the rows of its request that come before it."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _order_key(confidence):
    """A confidence that is not a number is the highest, as in PyTorch's sort."""
    return tl.where(confidence != confidence, float("inf"), confidence)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "candidates_ptr",
        "confidence_ptr",
        "request_ptr",
        "first_row_ptr",
        "num_to_unmask_ptr",
        "uniform_ptr",
        "probability_ptr",
        "order_ptr",
        "out_ptr",
    ],
)
def decide_rows_kernel(
    candidates_ptr,  # int64 [rows]
    confidence_ptr,  # float32 or float64 [rows]
    request_ptr,  # int64 [rows], ascending
    first_row_ptr,  # int64 [requests + 1]
    num_to_unmask_ptr,  # int64 [requests]
    uniform_ptr,  # float64 [rows], where HAS_CHANCE
    probability_ptr,  # float64 [requests], where HAS_CHANCE
    order_ptr,  # int64 [rows], where HAS_ORDER
    out_ptr,  # int64 [rows]
    num_rows,
    HAS_CHANCE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """BLOCK_ROWS rows per program."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    mask = rows < num_rows
    # Rows behind the last are taken for copies of it, so that they widen no range.
    row = tl.minimum(rows, num_rows - 1)
    request = tl.load(request_ptr + row)
    start = tl.load(first_row_ptr + request)  # [BLOCK_ROWS]
    end = tl.load(first_row_ptr + request + 1)
    mine = _order_key(tl.load(confidence_ptr + row))
    before = tl.zeros([BLOCK_ROWS], tl.int32)
    for first in range(tl.min(start, 0), tl.max(end, 0), BLOCK_OTHERS):
        others = first + tl.arange(0, BLOCK_OTHERS)
        theirs = _order_key(tl.load(confidence_ptr + others, mask=others < num_rows, other=0.0))
        same = (others[None, :] >= start[:, None]) & (others[None, :] < end[:, None])
        ahead = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (others[None, :] < row[:, None])
        )
        before += tl.sum((same & ahead).to(tl.int32), 1)

    selected = before < tl.load(num_to_unmask_ptr + request)
    if HAS_CHANCE:
        chance = tl.load(uniform_ptr + row) < tl.load(probability_ptr + request)
        selected = selected & chance
    token = tl.where(selected, tl.load(candidates_ptr + row), -1)
    target = tl.load(order_ptr + row) if HAS_ORDER else row
    tl.store(out_ptr + target, token, mask=mask)
