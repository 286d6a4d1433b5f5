"""Triton kernel of candidates and statistics: one row per program, one pass over it."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from vllm_sparsed.kernels.counter_random.kernel import row_key, uniform


@triton.jit(
    do_not_specialize_on_alignment=[
        "candidates_ptr",
        "values_ptr",
        "temperature_ptr",
        "seed_ptr",
        "step_ptr",
        "position_ptr",
        "cutoff_ptr",
    ]
)
def token_confidence_kernel(
    logits_ptr,  # [rows, vocab]
    candidates_ptr,  # int64 [rows]
    values_ptr,  # float32 [rows]
    temperature_ptr,  # float64 [rows], where DRAWN
    seed_ptr,  # int64 [rows], where DRAWN, like step and position
    step_ptr,
    position_ptr,
    cutoff_ptr,  # float32 [rows], where CUT
    vocab_size,
    stride,
    STATISTIC: tl.constexpr,  # configs.Statistic
    DRAWN: tl.constexpr,
    CUT: tl.constexpr,
    SHAPED: tl.constexpr,  # whether the statistic is of what temperature and cutoff leave
    STREAM_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online softmax: every sum is relative to the largest logit seen so far."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = -float("inf")  # of the logits that the statistic is about
    second = -float("inf")
    total = 0.0  # sum of exp(logit - largest)
    weighted = 0.0  # sum of exp(logit - largest) * (logit - largest)
    chosen = -float("inf")  # the candidate's logit
    candidate = 0
    if DRAWN:
        temperature = tl.load(temperature_ptr + row)
        seed, step = tl.load(seed_ptr + row), tl.load(step_ptr + row)
        key = row_key(seed, step, tl.load(position_ptr + row), STREAM_KEY)
        best = tl.full([], -float("inf"), tl.float64)
    else:
        best = -float("inf")
    divisor = 1.0
    if DRAWN:
        divisor = temperature.to(tl.float32)
    if CUT:
        cutoff = tl.load(cutoff_ptr + row)
        broken = 0  # whether some logit is not finite, which the cutoff may hide

    for start in range(0, vocab_size, BLOCK):
        tokens = start + columns
        inside = tokens < vocab_size
        x = tl.load(logits_ptr + row * stride + tokens, mask=inside, other=-float("inf"))
        x = x.to(tl.float32)  # [BLOCK]
        if CUT:
            stays = x / divisor >= cutoff
            bad = (x != x) | (x == float("inf"))
            broken = tl.maximum(broken, tl.max(bad.to(tl.int32), 0))
        if DRAWN:
            if CUT:
                drawn_from = tl.where(stays, x, -float("inf"))
                top_score = tl.full([], -float("inf"), tl.float64)
                place = vocab_size - 1
                # Few blocks have anything left: random numbers cost more than all else.
                if tl.max(drawn_from, 0) > -float("inf"):
                    noise = -tl.log(-tl.log(uniform(key, tokens.to(tl.int64))))
                    score = noise * temperature + drawn_from.to(tl.float64)
                    top_score = tl.max(score, 0)
                    place = tl.min(tl.where(score == top_score, tokens, vocab_size - 1), 0)
            else:
                noise = -tl.log(-tl.log(uniform(key, tokens.to(tl.int64))))
                score = noise * temperature + x.to(tl.float64)
                top_score = tl.max(score, 0)
                # The first of equals; a row of NaN has none.
                place = tl.min(tl.where(score == top_score, tokens, vocab_size - 1), 0)
        else:
            top_score = tl.max(x, 0)
            place = tl.min(tl.where(x == top_score, tokens, vocab_size - 1), 0)
        if SHAPED:
            x = x / divisor
            if CUT:
                x = tl.where(stays, x, -float("inf"))
        better = top_score > best
        candidate = tl.where(better, place, candidate)
        top = tl.max(x, 0)
        if STATISTIC == 1:
            x_at_place = tl.max(tl.where(tokens == place, x, -float("inf")), 0)
            chosen = tl.where(better, x_at_place, chosen)
        if STATISTIC == 2:
            at = tl.min(tl.where(x == top, tokens, vocab_size - 1), 0)
            runner_up = tl.max(tl.where(tokens == at, -float("inf"), x), 0)
            second = tl.maximum(tl.minimum(largest, top), tl.maximum(second, runner_up))
        new_largest = tl.maximum(largest, top)
        # Nothing but -inf so far: any finite reference gives sums of 0.
        reference = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        shift = tl.where(largest == -float("inf"), 0.0, largest - reference)
        scale = tl.where(largest == -float("inf"), 0.0, tl.exp(shift))
        e = tl.exp(x - reference)
        if STATISTIC == 3:
            distance = tl.where(e > 0.0, x - reference, 0.0)
            weighted = scale * (weighted + shift * total) + tl.sum(e * distance, 0)
        total = scale * total + tl.sum(e, 0)
        largest = new_largest
        best = tl.maximum(best, top_score)

    tl.store(candidates_ptr + row, candidate.to(tl.int64))
    if STATISTIC == 1:
        value = tl.exp(chosen - largest) / total
    if STATISTIC == 2:
        value = (1.0 - tl.exp(second - largest)) / total
    if STATISTIC == 3:
        value = weighted / total - tl.log(total)
    if CUT:
        value = tl.where(broken > 0, float("nan"), value)
    tl.store(values_ptr + row, value)
