"""How many key blocks a row of a pattern can keep, and where the generation part starts."""

from vllm_sparsed.kernels.block_selection import kept_columns


def generation_start_block(seq_len: int, canvas_len: int, block_size: int) -> int:
    """First block with at most canvas_len tokens from its start on, or else the last block.

    A block that holds the end of the prompt and the start of the canvas counts as prefill.
    """
    num_blocks = -(-seq_len // block_size)
    first_within_canvas = -(-(seq_len - canvas_len) // block_size)
    return min(max(first_within_canvas, 0), num_blocks - 1)


def kept_blocks_bound(num_blocks: int, num_generation_blocks: int, select: float) -> int:
    """Most key blocks that one row can keep, of so many blocks, the last ones generation."""
    num_prefill_blocks = num_blocks - num_generation_blocks
    prefill = min(num_prefill_blocks, kept_columns(num_blocks, select))
    return prefill + kept_columns(num_generation_blocks, select)


def pattern_width(max_num_blocks: int, max_canvas_blocks: int, select: float) -> int:
    """Most key blocks that a row of any request within these maxima can keep.

    Exact: the maximum of kept_blocks_bound over all sizes up to max_num_blocks and all generation
    parts up to min(size, max_canvas_blocks). The bound never falls as the prefill part grows, so
    only the largest size counts. max_canvas_blocks is ceil(canvas tokens / block size).
    """
    if max_num_blocks < 1:
        raise ValueError(f"max_num_blocks must be at least 1, got {max_num_blocks}")
    largest = min(max_num_blocks, max(max_canvas_blocks, 1))
    return max(
        kept_blocks_bound(max_num_blocks, generation, select)
        for generation in range(1, largest + 1)
    )
