"""Parts of attention kernels in Triton: products and the running softmax over tiles of keys."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def tile_scores(q, k, PRECISION: tl.constexpr):
    """q k^T. In float32 it sums few products at a time, which keeps long sums accurate."""
    M: tl.constexpr = q.shape[0]
    D: tl.constexpr = q.shape[1]
    N: tl.constexpr = k.shape[1]
    CHUNK: tl.constexpr = 32
    if PRECISION != "ieee":
        scores = tl.dot(q, k, input_precision=PRECISION)
    elif D > CHUNK:
        q_chunks = tl.permute(tl.reshape(q, [M, D // CHUNK, CHUNK]), (1, 0, 2))
        k_chunks = tl.reshape(k, [D // CHUNK, CHUNK, N])
        scores = tl.sum(tl.dot(q_chunks, k_chunks, input_precision=PRECISION), 0)
    else:
        # tl.dot takes no fewer than 16 products: the others of a chunk are with zeros.
        FEW: tl.constexpr = 8
        chunk = tl.arange(0, D // FEW)[:, None, None]
        inside = (tl.arange(0, D) // FEW)[None, None, :] == chunk
        q_chunks = tl.where(inside, q[None, :, :], 0.0)  # [D // FEW, M, D]
        k_chunks = tl.broadcast_to(k[None, :, :], [D // FEW, D, N])
        scores = tl.sum(tl.dot(q_chunks, k_chunks, input_precision=PRECISION), 0)
    return scores


@triton.jit
def scaled_exp2(x, scale_log2, PRECISION: tl.constexpr):
    """exp2(x * scale_log2), in float32 without the rounding error of the product."""
    exponent = x * scale_log2
    power = tl.exp2(exponent)
    if PRECISION == "ieee":
        LN2: tl.constexpr = 0.6931471805599453
        rest = tl.fma(x, tl.zeros_like(x) + scale_log2, -exponent)
        # Where x is -inf the rest is NaN.
        power = tl.where(x > float("-inf"), power + power * (rest * LN2), 0.0)
    return power


@triton.jit
def add_tile(
    q,  # [BLOCK_M, BLOCK_D]
    k,  # [BLOCK_D, BLOCK_N]
    v,  # [BLOCK_N, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] float32
    row_max,  # [BLOCK_M] float32, of the unscaled scores
    row_sum,  # [BLOCK_M] float32
    inside,  # [BLOCK_N], the tile's keys that count; unused unless MASKED
    scale_log2,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tile of keys, of which at least one counts, to the running softmax."""
    scores = tile_scores(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        scores = tl.where(inside[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # Subtract first: the rounding error then grows with the distance from the maximum only.
    weights = scaled_exp2(scores - new_max[:, None], scale_log2, PRECISION)
    correction = scaled_exp2(row_max - new_max, scale_log2, PRECISION)
    row_sum = row_sum * correction + tl.sum(weights, 1)
    if PRECISION == "ieee":
        # A sum of its own per tile: one long chain of float32 additions loses more bits.
        added = tl.dot(weights, v, input_precision=PRECISION)
        # Written as fma, which the compiler does not fold into the product as it does an addition.
        acc = tl.fma(acc, tl.broadcast_to(correction[:, None], acc.shape), added)
    else:
        acc = acc * correction[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum
