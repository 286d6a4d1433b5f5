"""Triton functions of the random numbers; int64 arithmetic wraps around."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from vllm_sparsed.kernels.counter_random import configs

_INCREMENT = tl.constexpr(configs.signed(configs.INCREMENT))
_MULTIPLIER_1 = tl.constexpr(configs.signed(configs.MULTIPLIER_1))
_MULTIPLIER_2 = tl.constexpr(configs.signed(configs.MULTIPLIER_2))


@triton.jit
def _shift(state, BITS: tl.constexpr):
    """Logical shift to the right."""
    return (state.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def _mix(state):
    state = (state ^ _shift(state, 30)) * _MULTIPLIER_1
    state = (state ^ _shift(state, 27)) * _MULTIPLIER_2
    return state ^ _shift(state, 31)


@triton.jit
def row_key(seed, step, position, STREAM_KEY: tl.constexpr):
    """int64 key of the rows with these int64 coordinates; STREAM_KEY: `stream_key`."""
    key = _mix(seed + STREAM_KEY)
    key = _mix(key + step * _INCREMENT)
    return _mix(key + position * _INCREMENT)


@triton.jit
def uniform(key, column):
    """float64 in (0, 1), of a row's key and int64 columns."""
    bits = _mix(key + (column + 1) * _INCREMENT)
    return (_shift(bits, 12).to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["seed_ptr", "step_ptr", "position_ptr"],
)
def uniform_rows_kernel(
    seed_ptr,  # int64 [rows]
    step_ptr,  # int64 [rows]
    position_ptr,  # int64 [rows]
    out_ptr,  # float64 [rows]
    num_rows,
    STREAM_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK rows per program."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < num_rows
    seed = tl.load(seed_ptr + rows, mask=mask, other=0)
    step = tl.load(step_ptr + rows, mask=mask, other=0)
    position = tl.load(position_ptr + rows, mask=mask, other=0)
    key = row_key(seed, step, position, STREAM_KEY)
    tl.store(out_ptr + rows, uniform(key, tl.zeros([BLOCK], tl.int64)), mask=mask)
