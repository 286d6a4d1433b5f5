"""Which rows a request's next pass computes where keys and values are kept between passes.

A refresh computes all rows and stores their keys and values; a window pass computes the rows of a
window alone, which attend to what is stored of the whole sequence. Everything here follows from the
request alone, never from what runs beside it.
"""

from dataclasses import dataclass
from typing import Final, Literal

Mode = Literal["none", "prefix", "dual", "window"]

MODES: Final[tuple[Mode, ...]] = ("none", "prefix", "dual", "window")


@dataclass(frozen=True, slots=True)
class ReusePolicy:
    """When a request refreshes and how far its windows reach.

    `prefix` and `dual` are Fast-dLLM's (arXiv 2505.22618): a refresh on entering a block, windows
    from the block's start to the end of the canvas or of the block. `window` refreshes by what has
    been decided and takes `margin` rows on either side of the block.

    Attributes:
        mode: not `none`.
        warmup_passes: `window`: so many first passes refresh.
        refresh_tokens: `window`: refresh when so many tokens have been decided since the last
            refresh, a pass counting for at least one.
        refresh_passes: `window`: refresh when so many passes have been taken since, itself
            included; None: no limit.
        margin: `window`: rows on either side of the block.
        logit_shift: 1 where row p - 1 decides position p (Dream), else 0.
    """

    mode: Mode
    warmup_passes: int
    refresh_tokens: int
    refresh_passes: int | None
    margin: int
    logit_shift: int

    @property
    def begins_alone(self) -> bool:
        """Whether the pass that begins a block decides its first position alone, whatever its
        confidence: Fast-dLLM's Dream, whose further passes lack the row before the block."""
        return self.mode != "window" and self.logit_shift == 1

    def expected_refreshes(self, num_tokens: int, block_length: int) -> int:
        """Refreshes that deciding so many tokens takes at most, tokens alone counted."""
        span = self.refresh_tokens if self.mode == "window" else block_length
        return -(-num_tokens // span)


@dataclass(frozen=True, slots=True)
class OpenBlock:
    """What may be decided in the coming pass; with several open blocks, all of them together.

    Attributes:
        start, end: token range [start, end) in the sequence.
        first_candidate: position of the first candidate, which may lie before the block.
    """

    start: int
    end: int
    first_candidate: int


@dataclass(slots=True)
class ReuseProgress:
    """Passes of one request so far, as far as the policy depends on them.

    Attributes:
        passes: taken.
        passes_since: taken since the last refresh, itself included.
        decided_since: tokens decided in these, each pass counting for at least one.
        block: of the last pass, [start, end) in the sequence; (-1, -1) before the first.
        has_patterns: whether a refresh has built the patterns.
    """

    passes: int = 0
    passes_since: int = 0
    decided_since: int = 0
    block: tuple[int, int] = (-1, -1)
    has_patterns: bool = False

    def window(self, policy: ReusePolicy, block: OpenBlock, seq_len: int) -> tuple[int, int] | None:
        """Rows [start, end) of the coming pass; None: all, a refresh."""
        if self.passes == 0:
            return None
        if policy.mode != "window":
            enters = (block.start, block.end) != self.block
            # What a row before the block decides only a refresh does: a mask inside the prompt, and
            # with a shift the block's first position.
            if enters or block.first_candidate < block.start + policy.logit_shift:
                return None
            return (block.start, block.end if policy.mode == "dual" else seq_len)
        # The tokens that the last passes of the block before decided were stored while masked.
        start = min(self.block[0], block.start)
        start = max(0, min(start - policy.margin, block.start - policy.logit_shift))
        due = (
            self.passes < policy.warmup_passes
            or self.decided_since >= policy.refresh_tokens
            or (policy.refresh_passes is not None and self.passes_since >= policy.refresh_passes)
            or block.first_candidate < start
        )
        return None if due else (start, min(seq_len, block.end + policy.margin))

    def first_alone(self, policy: ReusePolicy, block: OpenBlock) -> bool:
        """Whether the coming pass decides the block's first position alone, see `begins_alone`."""
        return (
            policy.begins_alone
            and (block.start, block.end) != self.block
            and block.first_candidate == block.start
        )

    def advance(self, block: OpenBlock, is_refresh: bool, num_decided: int) -> None:
        """Count a pass that has been taken in a block."""
        if is_refresh:
            self.passes_since = self.decided_since = 0
        self.passes += 1
        self.passes_since += 1
        self.decided_since += max(1, num_decided)
        self.block = (block.start, block.end)
