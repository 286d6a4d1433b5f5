"""Whether sparse attention pays for a request: predicted times of dense and sparse attention.

The decision is made once, when a request is planned, from the request and the engine's start
configuration alone: scheduler and workers come to the same one, whatever else runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from vllm_sparsed.kernels.pattern_building import generation_start_block, kept_blocks_bound

MARGIN: Final = 1.1
"""By this factor sparse attention has to be predicted faster: predictions are about as accurate."""

SECOND_SOFTMAX: Final = 1.4
"""Work of the isolated selection per generation key, in units of a key of the first selection: its
statistics are a pass of their own, and its importance a second exponential."""

LONG: Final = 16384
"""Above so many tokens `AttentionCosts.long_rates` hold: the longest that small blocks were
measured at full rate. At 65,536 the keys and values of one head, 32 MB, outgrow the L2 cache."""


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Time of a kernel over one sequence and all heads, fitted to measurements.

    Attributes:
        launch_us: microseconds that a call takes at least, host included.
        row_ns: nanoseconds per row, which is one token in one head.
        rate: TFLOP/s of the products.
    """

    launch_us: float
    row_ns: float
    rate: float

    def seconds(self, rows: float, flops: float) -> float:
        return max(self.launch_us * 1e-6, rows * self.row_ns * 1e-9 + flops / (self.rate * 1e12))


@dataclass(frozen=True, slots=True)
class FlashAttention4Range:
    """FlashAttention 4's sparse attention, where it was measured to be faster than ours.

    Attributes:
        cost: of a call for one sequence.
        block_size: of the patterns that it serves.
        min_tokens: shortest sequence for which it is taken.
        max_tokens: longest one.
    """

    cost: KernelCost
    block_size: int
    min_tokens: int
    max_tokens: int

    def chosen(self, seq_len: int, block_size: int) -> bool:
        """Whether it attends for a sequence: the same alone and in any batch."""
        return block_size == self.block_size and self.min_tokens <= seq_len <= self.max_tokens


@dataclass(frozen=True, slots=True)
class AttentionCosts:
    """What attention costs with one head dimension and dtype on one kind of device.

    Attributes:
        dense: full attention.
        sparse: attention over a pattern, by its block size.
        build: pattern building, by block size.
        lse_given: whether dense attention hands its log-sum-exp to pattern building, which
            otherwise needs another pass.
        long_rates: TFLOP/s of attention over a pattern of more than LONG tokens, by block size;
            where there is none, that of `sparse` holds.
        fa4: FlashAttention 4, where it is installed and faster for some sequences.
    """

    dense: KernelCost
    sparse: Mapping[int, KernelCost]
    build: Mapping[int, KernelCost]
    lse_given: bool = True
    long_rates: Mapping[int, float] = field(default_factory=dict)
    fa4: FlashAttention4Range | None = None

    def sparse_kernel(self, seq_len: int, block_size: int) -> KernelCost:
        """Cost of the kernel that attends over a pattern of one sequence."""
        if self.fa4 is not None and self.fa4.chosen(seq_len, block_size):
            return self.fa4.cost
        cost = self.sparse[block_size]
        if seq_len > LONG and block_size in self.long_rates:
            return replace(cost, rate=self.long_rates[block_size])
        return cost


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one attention layer, over all heads.

    Attributes:
        dense: of a dense step.
        sparse: of a sparse step.
        build: of building the pattern, beside the dense step it is part of.
    """

    dense: float
    sparse: float
    build: float

    def sparse_pays(self, sparse_steps: int) -> bool:
        """Whether so many sparse steps and one pattern are faster than as many dense steps."""
        return MARGIN * (self.build + sparse_steps * self.sparse) < sparse_steps * self.dense


@dataclass(frozen=True, slots=True)
class Crossover:
    """Predicts dense and sparse attention for one model on one kind of device.

    Attributes:
        costs: of its kernels.
        num_heads: query heads of the whole model, also where tensor parallelism divides them: a
            request has the same tokens with any number of devices.
        head_dim: elements of a head.
    """

    costs: AttentionCosts
    num_heads: int
    head_dim: int

    def predict(self, seq_len: int, canvas_len: int, block_size: int, select: float) -> Prediction:
        """Times for one sequence.

        The pattern is taken to keep as many blocks as it can, which is known beforehand: it keeps
        less where some of the most important blocks of all lie in the canvas.
        """
        num_blocks = -(-seq_len // block_size)
        generation_start = generation_start_block(seq_len, canvas_len, block_size)
        kept = kept_blocks_bound(num_blocks, num_blocks - generation_start, select)
        rows = seq_len * self.num_heads
        product = 2.0 * rows * self.head_dim  # of all rows with one key
        scored = keys_scored(seq_len, canvas_len, block_size, self.costs.lse_given)
        return Prediction(
            dense=self.costs.dense.seconds(rows, 2 * product * seq_len),
            sparse=self.costs.sparse_kernel(seq_len, block_size).seconds(
                rows, 2 * product * min(kept * block_size, seq_len)
            ),
            build=self.costs.build[block_size].seconds(rows, product * scored),
        )


def keys_scored(seq_len: int, canvas_len: int, block_size: int, lse_given: bool) -> float:
    """Keys that pattern building scores every query with, over all of its passes."""
    generation_start = generation_start_block(seq_len, canvas_len, block_size) * block_size
    keys = float(seq_len)
    if generation_start > 0:
        keys += SECOND_SOFTMAX * (seq_len - generation_start)
    return keys if lse_given else keys + seq_len
