"""Triton kernels of the block importance: softmax statistics per row, then sums per block.

A row's probabilities are exp2(s * scale_log2 - offset) * factor. The factor, applied to sums, takes
up what an offset in float32 rounds away.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def _load_rows(
    source,
    row,
    first_column,
    stride_row,
    seq_len,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] of a row-major source from (row, first_column); zeros past seq_len."""
    if TMA:
        tile = source.load([row, first_column])
    else:
        rows = row + tl.arange(0, ROWS)
        pointers = source + rows.to(tl.int64)[:, None] * stride_row
        pointers += first_column + tl.arange(0, COLUMNS)[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=rows[:, None] < seq_len, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _load_query(
    q_base,
    query_row,
    q_column,
    q_stride,
    seq_len,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_MAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TMA: tl.constexpr,
):
    """The query tile in two parts, since a tile's sides are powers of two: 80 = 64 + 16."""
    main = query_row  # a placeholder: sliced products load their own queries
    rest = query_row
    if CHUNK == 0:
        main = _load_rows(
            q_base, query_row, q_column, q_stride, seq_len, BLOCK_M, HEAD_DIM_MAIN, True, TMA
        )
        if HEAD_DIM > HEAD_DIM_MAIN:
            rest = _load_rows(
                q_base,
                query_row,
                q_column + HEAD_DIM_MAIN,
                q_stride,
                seq_len,
                BLOCK_M,
                HEAD_DIM - HEAD_DIM_MAIN,
                True,
                TMA,
            )
    return main, rest


@triton.jit
def _scores(
    q_source,
    q_main,
    q_rest,
    query_row,
    q_column,
    q_stride,
    k_source,
    key_row,
    k_column,
    k_stride,
    seq_len,
    key_end,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_MAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """q k^T in float32 [BLOCK_M, BLOCK_N], not scaled; if MASKED -inf for keys from key_end on."""
    if CHUNK == 0:
        k_main = _load_rows(
            k_source, key_row, k_column, k_stride, key_end, BLOCK_N, HEAD_DIM_MAIN, MASKED, TMA
        )
        s = tl.dot(q_main, tl.trans(k_main))
        if HEAD_DIM > HEAD_DIM_MAIN:
            k_rest = _load_rows(
                k_source,
                key_row,
                k_column + HEAD_DIM_MAIN,
                k_stride,
                key_end,
                BLOCK_N,
                HEAD_DIM - HEAD_DIM_MAIN,
                MASKED,
                TMA,
            )
            s = tl.dot(q_rest, tl.trans(k_rest), s)
    else:
        # Thin slices: float32 products keep both operands in registers, and others may be too big.
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in tl.range(0, HEAD_DIM, CHUNK, num_stages=1):
            q = _load_rows(
                q_source, query_row, q_column + d, q_stride, seq_len, BLOCK_M, CHUNK, True, False
            )
            k = _load_rows(
                k_source, key_row, k_column + d, k_stride, seq_len, BLOCK_N, CHUNK, MASKED, False
            )
            s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    if MASKED:
        keys = key_row + tl.arange(0, BLOCK_N)
        s = tl.where(keys[None, :] < key_end, s, float("-inf"))
    return s


@triton.jit
def _update_statistics(maximum, total, s, scale_log2):
    """Online softmax in base 2: running maximum and sum per row [BLOCK_M]."""
    new_maximum = tl.maximum(maximum, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_maximum[:, None])
    return new_maximum, total * tl.exp2(maximum - new_maximum) + tl.sum(p, 1)


@triton.jit(
    do_not_specialize=["seq_len", "generation_start", "group"],
)
def row_statistics_kernel(
    q_source,
    k_source,
    full_ptr,  # float32 [2, num_heads, L], written if FULL
    generation_ptr,  # float32 [2, num_heads, L]
    seq_len,
    generation_start,
    group,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_MAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    FULL: tl.constexpr,
):
    """Offset and factor of each query row over the generation keys and, if FULL, over all keys.

    The offset is the largest scaled score in base 2, the factor 1 / sum.
    """
    query_row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    if TMA:
        q_base = q_source
        k_base = k_source
        q_column = head * HEAD_DIM
        k_column = (head // group) * HEAD_DIM
    else:
        q_base = q_source + head.to(tl.int64) * q_stride_head
        k_base = k_source + (head // group).to(tl.int64) * k_stride_head
        q_column = 0
        k_column = 0
    q_main, q_rest = _load_query(
        q_base, query_row, q_column, q_stride_token, seq_len,
        HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_M, TMA,
    )  # fmt: skip

    rows = query_row + tl.arange(0, BLOCK_M)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The generation keys come first: their sum is read off on the way to the sum over all keys.
    for part in tl.static_range(2 if FULL else 1):
        first = generation_start if part == 0 else 0
        end = seq_len if part == 0 else generation_start
        ragged = end - (end - first) % BLOCK_N
        for key_row in range(first, ragged, BLOCK_N):
            s = _scores(
                q_base, q_main, q_rest, query_row, q_column, q_stride_token,
                k_base, key_row, k_column, k_stride_token, seq_len, end,
                HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_M, BLOCK_N, False, TMA,
            )  # fmt: skip
            maximum, total = _update_statistics(maximum, total, s, scale_log2)
        if ragged < end:
            s = _scores(
                q_base, q_main, q_rest, query_row, q_column, q_stride_token,
                k_base, ragged, k_column, k_stride_token, seq_len, end,
                HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_M, BLOCK_N, True, TMA,
            )  # fmt: skip
            maximum, total = _update_statistics(maximum, total, s, scale_log2)
        target = generation_ptr if part == 0 else full_ptr
        target += head.to(tl.int64) * seq_len + rows
        factors = tl.num_programs(1).to(tl.int64) * seq_len
        tl.store(target, maximum, mask=rows < seq_len)
        tl.store(target + factors, 1.0 / total, mask=rows < seq_len)


@triton.jit
def _row_sums(p, BLOCK_SIZE: tl.constexpr):
    """Sums of each row within key blocks: [BLOCK_M, BLOCK_N] -> [BLOCK_M, max(BLOCK_N / b, 1)]."""
    BLOCK_M: tl.constexpr = p.shape[0]
    BLOCK_N: tl.constexpr = p.shape[1]
    COLUMNS: tl.constexpr = BLOCK_N // BLOCK_SIZE if BLOCK_N > BLOCK_SIZE else 1
    return tl.sum(tl.reshape(p, [BLOCK_M, COLUMNS, BLOCK_N // COLUMNS]), 2)


@triton.jit
def _block_means(row_sums, BLOCK_SIZE: tl.constexpr):
    """Sums over query blocks by the block's area: [BLOCK_M, columns] -> [BLOCK_M / b, columns]."""
    ROWS: tl.constexpr = row_sums.shape[0] // BLOCK_SIZE
    blocks = tl.reshape(row_sums, [ROWS, BLOCK_SIZE, row_sums.shape[1]])
    return tl.sum(blocks, 1) * (1.0 / (BLOCK_SIZE * BLOCK_SIZE))


@triton.jit
def _load_statistics(statistics_ptr, head, rows, seq_len, end):
    """Offset and factor of rows [BLOCK_M] from [2, num_heads, L]; rows from end on add nothing."""
    pointers = statistics_ptr + head * seq_len + rows
    factors = tl.num_programs(1).to(tl.int64) * seq_len
    # +inf makes their terms exp2(-inf) = 0.
    offset = tl.load(pointers, rows < end, float("inf"))
    return offset, tl.load(pointers + factors, rows < end, 0.0)


@triton.jit
def _key_step(
    q_base, q_main, q_rest, query_row, q_column, q_stride_token,
    k_base, step, k_column, k_stride_token, seq_len, scale_log2,
    offset, factor, generation_offset, generation_factor,
    importance, generation, num_blocks, first_generation_block,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_MAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    GENERATION: tl.constexpr,
):  # fmt: skip
    """Sums of the key blocks of one step: max(BLOCK_N, b) keys, stored as whole blocks."""
    STEP: tl.constexpr = BLOCK_N if BLOCK_N > BLOCK_SIZE else BLOCK_SIZE
    ROW_BLOCKS: tl.constexpr = BLOCK_M // BLOCK_SIZE
    COLUMN_BLOCKS: tl.constexpr = STEP // BLOCK_SIZE
    for part in tl.static_range(STEP // BLOCK_N):
        s = _scores(
            q_base, q_main, q_rest, query_row, q_column, q_stride_token,
            k_base, step * STEP + part * BLOCK_N, k_column, k_stride_token, seq_len, seq_len,
            HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_M, BLOCK_N, MASKED, TMA,
        )  # fmt: skip
        p = _row_sums(tl.exp2(s * scale_log2 - offset[:, None]), BLOCK_SIZE)
        p_sum = p if part == 0 else p_sum + p  # noqa: F821
        if GENERATION:
            g = _row_sums(tl.exp2(s * scale_log2 - generation_offset[:, None]), BLOCK_SIZE)
            g_sum = g if part == 0 else g_sum + g  # noqa: F821

    rows = query_row // BLOCK_SIZE + tl.arange(0, ROW_BLOCKS)
    columns = step * COLUMN_BLOCKS + tl.arange(0, COLUMN_BLOCKS)
    mask = (rows[:, None] < num_blocks) & (columns[None, :] < num_blocks)
    tl.store(
        importance + rows[:, None] * num_blocks + columns[None, :],
        _block_means(p_sum * factor[:, None], BLOCK_SIZE),
        mask=mask,
    )
    if GENERATION:
        # A step may start before the generation part: those columns are summed but not stored.
        generation_columns = columns - first_generation_block
        width = num_blocks - first_generation_block
        tl.store(
            generation + rows[:, None] * width + generation_columns[None, :],
            _block_means(g_sum * generation_factor[:, None], BLOCK_SIZE),
            mask=mask & (generation_columns[None, :] >= 0),
        )


@triton.jit(
    do_not_specialize=[
        "seq_len",
        "num_blocks",
        "first_generation_block",
        "group",
        "stride_lse",
    ],
    do_not_specialize_on_alignment=["row_ptr"],
)
def block_importance_kernel(
    q_source,
    k_source,
    row_ptr,  # float32 [num_heads, L], log-sum-exp, if LSE_GIVEN; otherwise [2, num_heads, L]
    generation_row_ptr,  # float32 [2, num_heads, L]
    importance_ptr,  # float32 [num_heads, n, n]
    generation_ptr,  # float32 [num_heads, n, n - first_generation_block]
    seq_len,
    num_blocks,
    first_generation_block,  # n: write no generation map
    group,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    stride_lse,
    scale_log2,
    lse_factor,  # scale_log2 / scale, in two parts
    lse_factor_low,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_MAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
    LSE_GIVEN: tl.constexpr,
):
    """One tile of query rows of one head against all keys."""
    STEP: tl.constexpr = BLOCK_N if BLOCK_N > BLOCK_SIZE else BLOCK_SIZE
    query_row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    if TMA:
        q_base = q_source
        k_base = k_source
        q_column = head * HEAD_DIM
        k_column = (head // group) * HEAD_DIM
    else:
        q_base = q_source + head.to(tl.int64) * q_stride_head
        k_base = k_source + (head // group).to(tl.int64) * k_stride_head
        q_column = 0
        k_column = 0
    q_main, q_rest = _load_query(
        q_base, query_row, q_column, q_stride_token, seq_len,
        HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_M, TMA,
    )  # fmt: skip

    rows = query_row + tl.arange(0, BLOCK_M)
    head_offset = head.to(tl.int64)
    in_range = rows < seq_len
    if LSE_GIVEN:
        lse = tl.load(row_ptr + head_offset * stride_lse + rows, in_range, float("inf"))
        offset = lse * lse_factor
        lost = tl.fma(lse, lse_factor, -offset) + lse * lse_factor_low
        factor = tl.where(in_range, tl.exp2(-lost), 0.0)
    else:
        offset, factor = _load_statistics(row_ptr, head_offset, rows, seq_len, seq_len)
    # With no generation map there may be no statistics either.
    end = tl.where(first_generation_block < num_blocks, seq_len, 0)
    generation_offset, generation_factor = _load_statistics(
        generation_row_ptr, head_offset, rows, seq_len, end
    )
    importance = importance_ptr + head_offset * num_blocks * num_blocks
    generation = generation_ptr + head_offset * num_blocks * (num_blocks - first_generation_block)

    whole_steps = seq_len // STEP
    first_generation_step = tl.minimum(first_generation_block * BLOCK_SIZE // STEP, whole_steps)
    for step in range(first_generation_step):
        _key_step(
            q_base, q_main, q_rest, query_row, q_column, q_stride_token,
            k_base, step, k_column, k_stride_token, seq_len, scale_log2,
            offset, factor, generation_offset, generation_factor,
            importance, generation, num_blocks, first_generation_block,
            HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_SIZE, BLOCK_M, BLOCK_N, False, TMA, False,
        )  # fmt: skip
    for step in range(first_generation_step, whole_steps):
        _key_step(
            q_base, q_main, q_rest, query_row, q_column, q_stride_token,
            k_base, step, k_column, k_stride_token, seq_len, scale_log2,
            offset, factor, generation_offset, generation_factor,
            importance, generation, num_blocks, first_generation_block,
            HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_SIZE, BLOCK_M, BLOCK_N, False, TMA, True,
        )  # fmt: skip
    if whole_steps * STEP < seq_len:
        _key_step(
            q_base, q_main, q_rest, query_row, q_column, q_stride_token,
            k_base, whole_steps, k_column, k_stride_token, seq_len, scale_log2,
            offset, factor, generation_offset, generation_factor,
            importance, generation, num_blocks, first_generation_block,
            HEAD_DIM, HEAD_DIM_MAIN, CHUNK, BLOCK_SIZE, BLOCK_M, BLOCK_N, True, TMA, True,
        )  # fmt: skip
