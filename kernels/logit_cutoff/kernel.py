"""Triton kernel of the cutoff: one row per program, a search over the bits of a float32."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _key(x):
    """int32 that orders as the float32 does."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _load(row_ptr, tokens, vocab_size, divisor):
    x = tl.load(row_ptr + tokens, mask=tokens < vocab_size, other=-float("inf"))
    return x.to(tl.float32) / divisor


@triton.jit
def _search(
    row_ptr,
    vocab_size,
    divisor,
    largest,
    limit,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """The smallest key above which there is no more than `limit`: of the sum of exp(x - largest),
    or with COUNT of logits."""
    columns = tl.arange(0, BLOCK)
    way = tl.arange(0, WAYS)
    # What is above `high` is within the limit, what is above `low` is not.
    low = tl.full([], -(1 << 31), tl.int64) - 1
    high = _key(largest).to(tl.int64)
    while high - low > 1:
        step = (high - low + WAYS - 1) // WAYS
        pivots = tl.minimum(low + step * (way + 1), high)  # [WAYS]
        limits = pivots.to(tl.int32)
        above = tl.zeros([WAYS, BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            x = _load(row_ptr, start + columns, vocab_size, divisor)
            weight = tl.exp(x - largest)
            if COUNT:
                weight = tl.where(start + columns < vocab_size, 1.0, 0.0)
            above += tl.where(_key(x)[None, :] > limits[:, None], weight[None, :], 0.0)
        within = tl.sum(above, 1) <= limit  # rising: the last is within
        high = tl.min(tl.where(within, pivots, high), 0)
        low = tl.max(tl.where((pivots < high) & (within == 0), pivots, low), 0)
    return high


@triton.jit(do_not_specialize_on_alignment=["temperature_ptr", "top_p_ptr", "top_k_ptr", "out_ptr"])
def logit_cutoff_kernel(
    logits_ptr,  # [rows, vocab]
    temperature_ptr,  # float64 [rows], where SCALED
    top_p_ptr,  # float64 [rows], where TOP_P
    top_k_ptr,  # int64 [rows], where TOP_K
    out_ptr,  # float32 [rows]
    vocab_size,
    stride,
    SCALED: tl.constexpr,
    TOP_P: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """Sums are over the same columns in the same order whatever the batch is."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    divisor = 1.0
    if SCALED:
        divisor = tl.load(temperature_ptr + row).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    peaks = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        peaks = tl.maximum(peaks, _load(row_ptr, start + columns, vocab_size, divisor))
    largest = tl.max(peaks, 0)
    cutoff = tl.full([], -(1 << 31), tl.int64)
    if TOP_P:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            sums += tl.exp(_load(row_ptr, start + columns, vocab_size, divisor) - largest)
        limit = tl.load(top_p_ptr + row).to(tl.float32) * tl.sum(sums, 0)
        cutoff = _search(row_ptr, vocab_size, divisor, largest, limit, False, BLOCK, WAYS)
    if TOP_K:
        limit = (tl.load(top_k_ptr + row) - 1).to(tl.float32)
        kth = _search(row_ptr, vocab_size, divisor, largest, limit, True, BLOCK, WAYS)
        cutoff = tl.maximum(cutoff, kth)
    key = cutoff.to(tl.int32)
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    tl.store(out_ptr + row, bits.to(tl.float32, bitcast=True))
