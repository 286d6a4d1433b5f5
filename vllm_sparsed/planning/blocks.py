"""How the denoising steps of a request are laid out over its canvas."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A semi-autoregressive block of the canvas.

    Attributes:
        start, end: canvas-relative token range [start, end).
        steps: denoising steps spent on it, at least 1.
    """

    start: int
    end: int
    steps: int


def plan_blocks(
    canvas: int, block_length: int | None, steps: int | None, prompt_masks: int
) -> tuple[Block, ...]:
    """Spread the steps of a request evenly over the blocks of its canvas, left to right.

    The released LLaDA loop refuses a canvas that the block length does not divide, and steps that
    the blocks do not divide. Here the last block may be shorter, the first `steps % blocks` blocks
    get one step more, and a block never gets more steps than it has masks nor fewer than one.

    Args:
        canvas: canvas length in tokens, at least 1.
        block_length: tokens of a block; None: the whole canvas is one block.
        steps: steps wanted for the whole request; None: one for each canvas token.
        prompt_masks: mask tokens inside the prompt, which are filled in with the first block.

    Raises:
        ValueError: a count below its least value.
    """
    if canvas < 1 or prompt_masks < 0:
        raise ValueError(f"canvas of {canvas} tokens and {prompt_masks} masks in the prompt")
    if (block_length is not None and block_length < 1) or (steps is not None and steps < 1):
        raise ValueError(f"block length {block_length} and {steps} steps")
    length = canvas if block_length is None else min(block_length, canvas)
    starts = range(0, canvas, length)
    blocks = []
    for index, start in enumerate(starts):
        end = min(start + length, canvas)
        if steps is None:
            share = end - start
        else:
            share = steps // len(starts) + (index < steps % len(starts))
        masks = end - start + (prompt_masks if index == 0 else 0)
        blocks.append(Block(start, end, max(1, min(share, masks))))
    return tuple(blocks)


def pattern_step(total_steps: int, skip: float) -> int:
    """Return t*, the last step with full attention, in which the patterns are built.

    Steps 0 .. t* are dense, later ones sparse (SparseD, arXiv 2509.24014, its `skip`).
    """
    return int(total_steps * skip) + 1
