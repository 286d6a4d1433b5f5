"""The passes of a request whose keys and values are kept between them."""

from dataclasses import dataclass, field

from vllm.v1.core.sched.output import NewRequestData

from vllm_sparsed.planning.request_plan import RequestPlan
from vllm_sparsed.planning.reuse import OpenBlock, ReusePolicy, ReuseProgress

_NO_BLOCK = OpenBlock(-1, -1, -1)


@dataclass(slots=True)
class KeptPasses:
    """What a request keeps, and which rows its coming pass computes.

    Attributes:
        policy: of the request.
        pages: of vLLM's store, for each of its sequences.
        seq_len: tokens of a sequence.
        progress: passes so far.
        block: what may be decided in the coming pass.
        window: rows [start, end) that it computes; None: all, a refresh.
        first_alone: whether it decides the block's first position and no other.
    """

    policy: ReusePolicy
    pages: tuple[list[int], ...]
    seq_len: int
    progress: ReuseProgress = field(default_factory=ReuseProgress)
    block: OpenBlock = _NO_BLOCK
    window: tuple[int, int] | None = None
    first_alone: bool = False

    @classmethod
    def of_request(cls, data: NewRequestData, plan: RequestPlan) -> "KeptPasses | None":
        """None where the scheduler took no pages: nothing is kept, every pass computes all rows."""
        pages = data.block_ids[0] if data.block_ids else []
        if plan.reuse is None or not pages:
            return None
        each = len(pages) // plan.num_sequences
        of_sequences = (pages[i * each : (i + 1) * each] for i in range(plan.num_sequences))
        return cls(plan.reuse, tuple(of_sequences), plan.seq_len)

    def plan(self, block: OpenBlock) -> None:
        """Choose the rows of the coming pass."""
        self.block = block
        self.window = self.progress.window(self.policy, block, self.seq_len)
        self.first_alone = self.progress.first_alone(self.policy, block)

    def advance(self, num_decided: int, builds_patterns: bool) -> None:
        """Count the pass that has been taken."""
        self.progress.has_patterns |= builds_patterns
        self.progress.advance(self.block, self.window is None, num_decided)
