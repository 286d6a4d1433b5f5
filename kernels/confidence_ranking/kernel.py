"""Triton kernel of the decision: each candidate counts those of its group that come before it."""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_candidates", "mask_token_id"],
    do_not_specialize_on_alignment=[
        "tokens_ptr",
        "confidence_ptr",
        "group_ptr",
        "first_ptr",
        "rule_ptr",
        "quota_ptr",
        "bound_ptr",
        "uniform_ptr",
        "probability_ptr",
        "order_ptr",
        "out_ptr",
    ],
)
def decide_kernel(
    tokens_ptr,  # int64 [candidates]
    confidence_ptr,  # float32 or float64 [candidates]
    group_ptr,  # int64 [candidates], ascending
    first_ptr,  # int64 [groups + 1]
    rule_ptr,  # int64 [groups], where HAS_RULES, like bound; configs.Rule
    quota_ptr,  # int64 [groups]
    bound_ptr,  # float64 [groups]
    uniform_ptr,  # float64 [candidates], where HAS_CHANCE
    probability_ptr,  # float64 [groups], where HAS_CHANCE
    order_ptr,  # int64 [candidates], where HAS_ORDER
    out_ptr,  # int64 [candidates]
    num_candidates,
    mask_token_id,
    HAS_RULES: tl.constexpr,
    HAS_CHANCE: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    ENTROPY_UNIT: tl.constexpr,
    BLOCK_CANDIDATES: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """BLOCK_CANDIDATES candidates per program."""
    places = tl.program_id(0) * BLOCK_CANDIDATES + tl.arange(0, BLOCK_CANDIDATES)
    inside = places < num_candidates
    # Those behind the last are taken for copies of it, so that they widen no range.
    place = tl.minimum(places, num_candidates - 1)
    group = tl.load(group_ptr + place)
    start = tl.load(first_ptr + group)  # [BLOCK_CANDIDATES]
    end = tl.load(first_ptr + group + 1)
    token = tl.load(tokens_ptr + place)
    mine = tl.load(confidence_ptr + place)
    finite = mine == mine
    if HAS_RULES:
        rule = tl.load(rule_ptr + group)
        by_count = rule == 0
    before = tl.zeros([BLOCK_CANDIDATES], tl.int32)
    # Entropies before it in units, exact in any order.
    units_before = tl.zeros([BLOCK_CANDIDATES], tl.int64)
    for lowest in range(tl.min(start, 0), tl.max(end, 0), BLOCK_OTHERS):
        others = lowest + tl.arange(0, BLOCK_OTHERS)
        known = others < num_candidates
        theirs = tl.load(confidence_ptr + others, mask=known, other=0.0)
        ahead = (others[None, :] >= start[:, None]) & (others[None, :] < end[:, None])
        # Never true of what is not a number.
        ahead = ahead & (
            (theirs[None, :] > mine[:, None])
            | ((theirs[None, :] == mine[:, None]) & (others[None, :] < place[:, None]))
        )
        if HAS_RULES:
            not_mask = tl.load(tokens_ptr + others, mask=known, other=0) != mask_token_id
            ahead = ahead & (by_count[:, None] | not_mask[None, :])
            entropy = tl.where(theirs == -float("inf"), 0.0, tl.maximum(-theirs, 0.0))
            units = (entropy.to(tl.float64) * (1.0 / ENTROPY_UNIT)).to(tl.int64)
            units_before += tl.sum(tl.where(ahead, units[None, :], 0), 1)
        before += tl.sum(ahead.to(tl.int32), 1)

    selected = before < tl.load(quota_ptr + group)
    if HAS_RULES:
        bound = tl.load(bound_ptr + group)
        value = mine.to(tl.float64)
        within = (rule == 1) & (value >= bound)
        within = within | ((rule == 2) & (value >= 1.0 - bound / (before + 2).to(tl.float64)))
        sum_before = units_before.to(tl.float64) * ENTROPY_UNIT
        within = within | ((rule == 3) & (value > -float("inf")) & (sum_before <= bound))
        within = within | ((rule == 4) & (-value < bound))
        selected = (selected | within) & (by_count | (token != mask_token_id))
    if HAS_CHANCE:
        chance = tl.load(uniform_ptr + place) < tl.load(probability_ptr + group)
        selected = selected & chance
    decided = tl.where(finite, tl.where(selected, token, -1), -2)
    target = tl.load(order_ptr + place) if HAS_ORDER else place
    tl.store(out_ptr + target, decided, mask=inside)
