"""Block-sparse attention forward for sm_90 and 32-token blocks: two pattern rows per warpgroup.

wgmma multiplies 64 rows at a time, so a tile holds two neighbouring pattern rows of one head. The
producer warp merges their two lists while it fetches, and hands the consumer four flags per pair of
key blocks: which row keeps which block. Patterns of neighbouring rows overlap, so little is masked.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vllm_sparsed.kernels.block_sparse_attention.hopper_kernel import (
    _UNALIGNED,
    _UNSPECIALIZED,
    _tma_load,
)

BLOCK_SIZE = gl.constexpr(32)
BLOCK_M = gl.constexpr(64)
# The running maximum starts at a finite value below every score: a row that keeps nothing of the
# first blocks then gets weights exp2(-inf - LOWEST) = 0, where -inf - -inf would be NaN.
LOWEST = gl.constexpr(-1.0e20)


@gluon.jit
def _pair_of_tile(tile, num_groups, tables):
    """Head, request and the two index lists of a tile, each with its length."""
    (
        group_row_ptr, seq_start_ptr, seq_len_ptr, query_block_ptr, pattern_row_ptr,
        indices_ptr, counts_ptr,
        stride_indices_row, stride_indices_head, stride_counts_row, stride_counts_head,
    ) = tables  # fmt: skip
    head = tile // num_groups
    row = gl.load(group_row_ptr + tile % num_groups)
    seq_start = gl.load(seq_start_ptr + row)
    seq_len = gl.load(seq_len_ptr + row)
    query_block = gl.load(query_block_ptr + row)
    has_second = (query_block + 1) * BLOCK_SIZE < seq_len
    slot_a = gl.load(pattern_row_ptr + row).to(gl.int64)
    slot_b = gl.load(pattern_row_ptr + row + 1, mask=has_second, other=0).to(gl.int64)
    counts_ptr += head * stride_counts_head
    count_a = gl.load(counts_ptr + slot_a * stride_counts_row)
    count_b = gl.load(counts_ptr + slot_b * stride_counts_row, mask=has_second, other=0)
    indices_ptr += head * stride_indices_head
    list_a = indices_ptr + slot_a * stride_indices_row
    list_b = indices_ptr + slot_b * stride_indices_row
    return head, seq_start, seq_len, query_block, list_a, count_a, list_b, count_b


@gluon.jit
def _entry(list_ptr, position):
    """The listed block, or -1 before the start of the list."""
    return gl.load(list_ptr + position, mask=position >= 0, other=-1).to(gl.int32)


@gluon.jit
def _produce(inputs, shared, heads_per_kv):
    q_desc, k_desc, v_desc = inputs
    q_smem, k_smem, v_smem, flags_smem, barriers, tables, num_groups, num_tiles = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    HEAD_DIM: gl.constexpr = q_smem.shape[1]
    STAGES: gl.constexpr = flags_smem.shape[0]
    flag_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step_k = 0
    step_v = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, seq_start, seq_len, query_block, list_a, count_a, list_b, count_b = _pair_of_tile(
            tile, num_groups, tables
        )
        column = head // heads_per_kv * HEAD_DIM
        last_start = seq_len - BLOCK_SIZE
        mbarrier.wait(q_empty, (turn & 1) ^ 1)
        mbarrier.expect(q_full, q_desc.block_type.nbytes)
        _tma_load(q_desc, [seq_start + query_block * BLOCK_SIZE, head * HEAD_DIM], q_full, q_smem)
        # Both lists from their ends: the ragged block comes first, moved back to end with the
        # request, so that foreign tokens are never read.
        at_a = count_a - 1
        at_b = count_b - 1
        block_a = _entry(list_a, at_a)
        block_b = _entry(list_b, at_b)
        v_token_0 = 0
        v_token_1 = 0
        first = True
        while gl.maximum(block_a, block_b) >= 0:
            block_0 = gl.maximum(block_a, block_b)
            in_a = (block_a == block_0).to(gl.int32)
            in_b = (block_b == block_0).to(gl.int32)
            flags = in_a + 2 * in_b
            at_a -= in_a
            at_b -= in_b
            block_a = _entry(list_a, at_a)
            block_b = _entry(list_b, at_b)
            block_1 = gl.maximum(block_a, block_b)
            found = (block_1 >= 0).to(gl.int32)
            in_a = (block_a == block_1).to(gl.int32) * found
            in_b = (block_b == block_1).to(gl.int32) * found
            flags += 4 * in_a + 8 * in_b
            at_a -= in_a
            at_b -= in_b
            block_a = _entry(list_a, at_a)
            block_b = _entry(list_b, at_b)
            token_0 = seq_start + gl.minimum(block_0 * BLOCK_SIZE, last_start)
            # Without a second block any tokens of the request do: both flags are 0.
            token_1 = seq_start + gl.maximum(block_1, 0) * BLOCK_SIZE

            slot = step_k % STAGES
            mbarrier.wait(k_empty.index(slot), ((step_k // STAGES) & 1) ^ 1)
            flags_smem.index(slot).store(gl.full([1], flags, gl.int32, flag_layout))
            mbarrier.expect(k_full.index(slot), 2 * k_desc.block_type.nbytes)
            _tma_load(k_desc, [token_0, column], k_full.index(slot), k_smem.index(2 * slot))
            _tma_load(k_desc, [token_1, column], k_full.index(slot), k_smem.index(2 * slot + 1))
            step_k += 1
            # Values are needed one step later than keys.
            if not first:
                slot = step_v % STAGES
                mbarrier.wait(v_empty.index(slot), ((step_v // STAGES) & 1) ^ 1)
                mbarrier.expect(v_full.index(slot), 2 * v_desc.block_type.nbytes)
                _tma_load(v_desc, [v_token_0, column], v_full.index(slot), v_smem.index(2 * slot))
                _tma_load(
                    v_desc, [v_token_1, column], v_full.index(slot), v_smem.index(2 * slot + 1)
                )
                step_v += 1
            first = False
            v_token_0 = token_0
            v_token_1 = token_1
        if not first:
            slot = step_v % STAGES
            mbarrier.wait(v_empty.index(slot), ((step_v // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(slot), 2 * v_desc.block_type.nbytes)
            _tma_load(v_desc, [v_token_0, column], v_full.index(slot), v_smem.index(2 * slot))
            _tma_load(v_desc, [v_token_1, column], v_full.index(slot), v_smem.index(2 * slot + 1))
            step_v += 1
        # Flags of 0 end the tile.
        slot = step_k % STAGES
        mbarrier.wait(k_empty.index(slot), ((step_k // STAGES) & 1) ^ 1)
        flags_smem.index(slot).store(gl.full([1], 0, gl.int32, flag_layout))
        mbarrier.arrive(k_full.index(slot))
        step_k += 1
        turn += 1


@gluon.jit
def _next_flags(flags_smem, k_full, step):
    """Wait for the keys of this step; 0 says that the tile has no more."""
    STAGES: gl.constexpr = flags_smem.shape[0]
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), (step // STAGES) & 1)
    return gl.max(flags_smem.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _row_mask(flags, row):
    """Whether the row's pattern keeps the key block that the two lowest flags are about."""
    return (((flags >> (row // BLOCK_SIZE)) & 1) != 0)[:, None]


@gluon.jit
def _consume(output, shared):
    out_ptr, stride_out_token, stride_out_head, scale_log2 = output
    q_smem, k_smem, v_smem, flags_smem, barriers, tables, num_groups, num_tiles = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    HEAD_DIM: gl.constexpr = q_smem.shape[1]
    STAGES: gl.constexpr = flags_smem.shape[0]
    dtype: gl.constexpr = q_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_SIZE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    row = gl.arange(0, BLOCK_M, s_rows)
    no_scores = gl.zeros([BLOCK_M, BLOCK_SIZE], gl.float32, s_layout)

    step_k = 0
    step_v = 0
    turn = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        head, seq_start, seq_len, query_block, list_a, count_a, list_b, count_b = _pair_of_tile(
            tile, num_groups, tables
        )
        acc = gl.zeros([BLOCK_M, HEAD_DIM], gl.float32, o_layout)
        row_sum = gl.zeros([BLOCK_M], gl.float32, s_rows)
        row_max = gl.full([BLOCK_M], LOWEST, gl.float32, s_rows)
        mbarrier.wait(q_full, turn & 1)
        flags = _next_flags(flags_smem, k_full, step_k)
        if flags != 0:
            slot = step_k % STAGES
            s_0 = warpgroup_mma(
                q_smem, k_smem.index(2 * slot).permute((1, 0)), no_scores,
                use_acc=False, is_async=True,
            )  # fmt: skip
            s_1 = warpgroup_mma(
                q_smem, k_smem.index(2 * slot + 1).permute((1, 0)), no_scores,
                use_acc=False, is_async=True,
            )  # fmt: skip
            last_block = gl.maximum(_entry(list_a, count_a - 1), _entry(list_b, count_b - 1))
            foreign = gl.maximum((last_block + 1) * BLOCK_SIZE - seq_len, 0)
            own = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, s_layout)) >= foreign
            s_0, s_1 = warpgroup_mma_wait(0, deps=[s_0, s_1])
            mbarrier.arrive(k_empty.index(slot))
            step_k += 1
            s_0 = gl.where(_row_mask(flags, row) & own[None, :], s_0, float("-inf"))
            s_1 = gl.where(_row_mask(flags >> 2, row), s_1, float("-inf"))
            new_max = gl.maximum(gl.max(s_0, 1), gl.max(s_1, 1)) * scale_log2
            row_max = gl.maximum(row_max, new_max)
            w_0 = gl.exp2(s_0 * scale_log2 - row_max[:, None])
            w_1 = gl.exp2(s_1 * scale_log2 - row_max[:, None])
            row_sum = gl.sum(w_0 + w_1, 1)
            p_0 = gl.convert_layout(w_0.to(dtype), p_layout)
            p_1 = gl.convert_layout(w_1.to(dtype), p_layout)

            flags = _next_flags(flags_smem, k_full, step_k)
            while flags != 0:
                slot = step_k % STAGES
                slot_v = step_v % STAGES
                s_0 = warpgroup_mma(
                    q_smem, k_smem.index(2 * slot).permute((1, 0)), no_scores,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                s_1 = warpgroup_mma(
                    q_smem, k_smem.index(2 * slot + 1).permute((1, 0)), no_scores,
                    use_acc=False, is_async=True,
                )  # fmt: skip
                mbarrier.wait(v_full.index(slot_v), (step_v // STAGES) & 1)
                acc = warpgroup_mma(p_0, v_smem.index(2 * slot_v), acc, is_async=True)
                acc = warpgroup_mma(p_1, v_smem.index(2 * slot_v + 1), acc, is_async=True)
                s_0, s_1 = warpgroup_mma_wait(2, deps=[s_0, s_1])
                mbarrier.arrive(k_empty.index(slot))
                step_k += 1
                s_0 = gl.where(_row_mask(flags, row), s_0, float("-inf"))
                s_1 = gl.where(_row_mask(flags >> 2, row), s_1, float("-inf"))
                new_max = gl.maximum(gl.max(s_0, 1), gl.max(s_1, 1)) * scale_log2
                new_max = gl.maximum(row_max, new_max)
                correction = gl.exp2(row_max - new_max)
                w_0 = gl.exp2(s_0 * scale_log2 - new_max[:, None])
                w_1 = gl.exp2(s_1 * scale_log2 - new_max[:, None])
                row_sum = row_sum * correction + gl.sum(w_0 + w_1, 1)
                row_max = new_max
                acc, p_0, p_1 = warpgroup_mma_wait(0, deps=[acc, p_0, p_1])
                mbarrier.arrive(v_empty.index(slot_v))
                step_v += 1
                acc = acc * gl.convert_layout(correction, o_rows)[:, None]
                p_0 = gl.convert_layout(w_0.to(dtype), p_layout)
                p_1 = gl.convert_layout(w_1.to(dtype), p_layout)
                flags = _next_flags(flags_smem, k_full, step_k)

            slot_v = step_v % STAGES
            mbarrier.wait(v_full.index(slot_v), (step_v // STAGES) & 1)
            acc = warpgroup_mma(p_0, v_smem.index(2 * slot_v), acc, is_async=True)
            acc = warpgroup_mma(p_1, v_smem.index(2 * slot_v + 1), acc, is_async=True)
            acc, p_0, p_1 = warpgroup_mma_wait(0, deps=[acc, p_0, p_1])
            mbarrier.arrive(v_empty.index(slot_v))
            step_v += 1
        mbarrier.arrive(k_empty.index(step_k % STAGES))
        step_k += 1
        mbarrier.arrive(q_empty)

        # A row without kept keys has a sum of 0: its output is defined as 0.
        total = gl.where(row_sum > 0, row_sum, 1.0)
        acc = acc * gl.convert_layout(1.0 / total, o_rows)[:, None]
        query = query_block * BLOCK_SIZE + gl.arange(0, BLOCK_M, o_rows)
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
        token = (seq_start + query).to(gl.int64)
        gl.store(
            out_ptr + (token * stride_out_token + head * stride_out_head)[:, None] + dim[None, :],
            acc.to(dtype),
            mask=(query < seq_len)[:, None],
        )
        turn += 1


@gluon.jit(
    do_not_specialize=[*_UNSPECIALIZED, "num_groups"],
    do_not_specialize_on_alignment=[*_UNALIGNED, "group_row_ptr"],
)
def block_sparse_forward_sm90_pairs(
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
    num_groups,
    num_tiles,
    heads_per_kv,
    group_row_ptr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Persistent over tiles of two pattern rows and one head.

    Grid: (programs,); tile t is group t % num_groups of head t // num_groups.
    """
    dtype: gl.constexpr = q_desc.dtype
    ring: gl.constexpr = [2 * STAGES] + k_desc.block_type.shape
    q_smem = gl.allocate_shared_memory(dtype, q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, ring, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, ring, v_desc.layout)
    flags_smem = gl.allocate_shared_memory(
        gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    )
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=1)

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (
        group_row_ptr, seq_start_ptr, seq_len_ptr, query_block_ptr, pattern_row_ptr,
        indices_ptr, counts_ptr,
        stride_indices_row, stride_indices_head, stride_counts_row, stride_counts_head,
    )  # fmt: skip
    shared = (q_smem, k_smem, v_smem, flags_smem, barriers, tables, num_groups, num_tiles)
    output = (out_ptr, stride_out_token, stride_out_head, scale_log2)
    inputs = (q_desc, k_desc, v_desc)
    gl.warp_specialize(
        [
            (_consume, (output, shared)),
            (_produce, (inputs, shared, heads_per_kv)),
        ],
        [1],
        [24],
    )
