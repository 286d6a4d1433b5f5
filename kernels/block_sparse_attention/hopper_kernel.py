"""Block-sparse attention forward for sm_90 in Gluon: TMA producer warp, asynchronous wgmma.

A producer warp fetches the kept key and value blocks into rings in shared memory. Each consumer
warpgroup owns 64 queries and overlaps the product q k^T of one key block with the product p v of
the block before it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Triton 3.7 renamed the call.
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _row_of_tile(
    tile,
    num_rows,
    seq_start_ptr,
    seq_len_ptr,
    query_block_ptr,
    pattern_row_ptr,
    indices_ptr,
    counts_ptr,
    stride_indices_row,
    stride_indices_head,
    stride_counts_row,
    stride_counts_head,
):
    """Head, request and index list of a tile. Rows vary fastest: neighbours share keys in L2."""
    head = tile // num_rows
    row = tile % num_rows
    seq_start = gl.load(seq_start_ptr + row)
    seq_len = gl.load(seq_len_ptr + row)
    query_block = gl.load(query_block_ptr + row)
    pattern_row = gl.load(pattern_row_ptr + row).to(gl.int64)
    list_ptr = indices_ptr + pattern_row * stride_indices_row + head * stride_indices_head
    count = gl.load(counts_ptr + pattern_row * stride_counts_row + head * stride_counts_head)
    return head, seq_start, seq_len, query_block, list_ptr, count


@gluon.jit
def _produce(inputs, shared, heads_per_kv):
    q_desc, k_desc, v_desc = inputs
    q_smem, k_smem, v_smem, barriers, tables, num_rows, num_tiles = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_SIZE: gl.constexpr = k_smem.shape[1]
    HEAD_DIM: gl.constexpr = q_desc.block_type.shape[1]
    step = 0  # key blocks fetched so far, over all tiles
    turn = 0  # tiles so far
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, seq_start, seq_len, query_block, list_ptr, count = _row_of_tile(
            tile, num_rows, *tables
        )
        column = head // heads_per_kv * HEAD_DIM
        last_start = seq_len - BLOCK_SIZE
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        _tma_load(q_desc, [seq_start + query_block * BLOCK_SIZE, head * HEAD_DIM], q_full, q_smem)
        # From the last listed block to the first: the ragged one comes first and stays out of the
        # main loop. It is moved back to end with the request, so it never reads foreign tokens.
        value_token = 0
        for i in range(count):
            block = gl.load(list_ptr + count - 1 - i).to(gl.int32)
            token = seq_start + gl.minimum(block * BLOCK_SIZE, last_start)
            slot = (step + i) % STAGES
            phase = ((step + i) // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            _tma_load(k_desc, [token, column], k_full.index(slot), k_smem.index(slot))
            # Values are needed one block later than keys.
            if i > 0:
                slot_v = (step + i - 1) % STAGES
                phase_v = ((step + i - 1) // STAGES) & 1
                mbarrier.wait(v_empty.index(slot_v), phase_v ^ 1)
                mbarrier.expect(v_full.index(slot_v), v_desc.block_type.nbytes)
                _tma_load(v_desc, [value_token, column], v_full.index(slot_v), v_smem.index(slot_v))
            value_token = token
        if count > 0:
            slot_v = (step + count - 1) % STAGES
            phase_v = ((step + count - 1) // STAGES) & 1
            mbarrier.wait(v_empty.index(slot_v), phase_v ^ 1)
            mbarrier.expect(v_full.index(slot_v), v_desc.block_type.nbytes)
            _tma_load(v_desc, [value_token, column], v_full.index(slot_v), v_smem.index(slot_v))
        step += count
        turn += 1


@gluon.jit
def _consume(output, shared, CONSUMER: gl.constexpr):
    out_ptr, stride_out_token, stride_out_head, scale_log2 = output
    q_smem, k_smem, v_smem, barriers, tables, num_rows, num_tiles = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    STAGES: gl.constexpr = k_smem.shape[0]
    BLOCK_SIZE: gl.constexpr = k_smem.shape[1]
    BLOCK_M: gl.constexpr = 64
    HEAD_DIM: gl.constexpr = q_smem.shape[1]
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    q_tile = q_smem.slice(CONSUMER * BLOCK_M, BLOCK_M, dim=0)

    step = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, seq_start, seq_len, query_block, list_ptr, count = _row_of_tile(
            tile, num_rows, *tables
        )
        acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, o_layout)
        row_sum = gl.zeros([BLOCK_M], gl.float32, s_rows)
        no_scores = gl.zeros([BLOCK_M, BLOCK_SIZE], gl.float32, s_layout)
        mbarrier.wait(q_full, turn & 1)
        if count > 0:
            slot = step % STAGES
            mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
            scores = warpgroup_mma(
                q_tile, k_smem.index(slot).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            last_block = gl.load(list_ptr + count - 1).to(gl.int32)
            foreign = gl.maximum((last_block + 1) * BLOCK_SIZE - seq_len, 0)
            column = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, s_layout))
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(slot))
            scores = gl.where((column >= foreign)[None, :], scores, float("-inf"))
            row_max = gl.max(scores, 1) * scale_log2
            weights = gl.exp2(scores * scale_log2 - row_max[:, None])
            row_sum = gl.sum(weights, 1)
            p = gl.convert_layout(weights.to(dtype), p_layout)

            for i in range(step + 1, step + count):
                slot = i % STAGES
                slot_v = (i - 1) % STAGES
                mbarrier.wait(k_full.index(slot), (i // STAGES) & 1)
                scores = warpgroup_mma(
                    q_tile, k_smem.index(slot).permute((1, 0)), no_scores,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(v_full.index(slot_v), ((i - 1) // STAGES) & 1)
                acc = warpgroup_mma(p, v_smem.index(slot_v), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(slot))
                new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
                correction = gl.exp2(row_max - new_max)
                weights = gl.exp2(scores * scale_log2 - new_max[:, None])
                row_sum = row_sum * correction + gl.sum(weights, 1)
                row_max = new_max
                acc, p = warpgroup_mma_wait(0, deps=[acc, p])
                mbarrier.arrive(v_empty.index(slot_v))
                acc = acc * gl.convert_layout(correction, o_rows)[:, None]
                p = gl.convert_layout(weights.to(dtype), p_layout)

            slot_v = (step + count - 1) % STAGES
            mbarrier.wait(v_full.index(slot_v), ((step + count - 1) // STAGES) & 1)
            acc = warpgroup_mma(p, v_smem.index(slot_v), acc, is_async=True)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])
            mbarrier.arrive(v_empty.index(slot_v))
        mbarrier.arrive(q_empty)

        # A row without kept keys has a sum of 0: its output is defined as 0.
        total = gl.where(row_sum > 0, row_sum, 1.0)
        acc = acc * gl.convert_layout(1.0 / total, o_rows)[:, None]
        query = CONSUMER * BLOCK_M + gl.arange(0, BLOCK_M, o_rows) + query_block * BLOCK_SIZE
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
        token = (seq_start + query).to(gl.int64)
        gl.store(
            out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + dim[None, :],
            acc.to(dtype),
            mask=(query < seq_len)[:, None],
        )
        step += count
        turn += 1


_UNSPECIALIZED = [
    "stride_indices_row",
    "stride_indices_head",
    "stride_counts_row",
    "stride_counts_head",
    "num_rows",
    "num_tiles",
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


@gluon.jit(do_not_specialize=_UNSPECIALIZED, do_not_specialize_on_alignment=_UNALIGNED)
def block_sparse_forward_sm90(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    indices_ptr,
    counts_ptr,
    seq_start_ptr,
    seq_len_ptr,
    query_block_ptr,
    pattern_row_ptr,
    stride_out_token,
    stride_out_head,
    stride_indices_row,
    stride_indices_head,
    stride_counts_row,
    stride_counts_head,
    scale_log2,
    num_rows,
    num_tiles,
    heads_per_kv,
    BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Persistent over tiles of one pattern row and head: BLOCK_SIZE queries, one or two consumers.

    Grid: (programs,); tile t is row t % num_rows of head t // num_rows.
    """
    CONSUMERS: gl.constexpr = BLOCK_SIZE // 64
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    tables = (
        seq_start_ptr, seq_len_ptr, query_block_ptr, pattern_row_ptr, indices_ptr, counts_ptr,
        stride_indices_row, stride_indices_head, stride_counts_row, stride_counts_head,
    )  # fmt: skip
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    shared = (q_smem, k_smem, v_smem, barriers, tables, num_rows, num_tiles)
    inputs = (q_desc, k_desc, v_desc)
    output = (out_ptr, stride_out_token, stride_out_head, scale_log2)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (output, shared, 0)),
                (_consume, (output, shared, 1)),
                (_produce, (inputs, shared, heads_per_kv)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (output, shared, 0)),
                (_produce, (inputs, shared, heads_per_kv)),
            ],
            [1],
            [24],
        )
