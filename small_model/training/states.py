"""Which tokens of an answer are masked in training: at random, or as decoding meets them.

LLaDA's objective masks every token with one probability t (arXiv 2502.09992, section 2.2). A canvas
that is decided in blocks shows other states: all before the block is there, all after it is masked,
and in a block whose tokens depend on each other a prefix is there first. An answer of hundreds of
tokens almost never looks like that at random, so most of its states are drawn from these.
"""

import random
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

BLOCK: Final = 32  # tokens decided together, from the beginning of the answer
SMALLEST_RATIO: Final = 0.1  # of masked tokens: bounds the weight 1/t
FULLY_MASKED: Final = 0.4  # share of the short answers with ratio 1
FULLY_MASKED_DEPENDENT: Final = 0.15  # likewise, of answers that build on themselves
UNIFORM: Final = 0.2  # share of the states with a ratio of its own
LONG: Final = 64  # tokens of an answer from which on fully masked ones are rare
LONG_SHARE: Final = 0.25  # of both shares above, for long answers
ALL_AFTER_PREFIX: Final = 0.5  # of the states of a block: nothing but a prefix is there
SUFFIX: Final = 0.4  # of the states of a block: its end is there too
PADDING_ALONE: Final = 0.5  # of these: no more than the padding
NEXT_TOKENS: Final = 6  # behind a prefix, that count in full
LATER_WEIGHT: Final = 0.25  # of others in the block
BEYOND_WEIGHT: Final = 0.05  # of what lies behind the block


@dataclass(frozen=True, slots=True)
class State:
    """What is masked of an answer and its padding.

    Attributes:
        hidden: bool [tokens].
        factors: float64 [tokens], what a token's weight is multiplied by.
        counted: bool [tokens], of which all must be right for the answer to count as right; none
            where it does not count at all.
    """

    hidden: npt.NDArray[np.bool_]
    factors: npt.NDArray[np.float64]
    counted: npt.NDArray[np.bool_]


def draw_state(
    rng: random.Random, generator: np.random.Generator, answer: int, tokens: int, dependent: bool
) -> State:
    """A state of an answer.

    Args:
        rng: for what is drawn once.
        generator: for what is drawn for every token.
        answer: tokens with the end of turn.
        tokens: with the padding.
        dependent: whether the next token behind a prefix counts, not the fully masked answer.
    """
    share = LONG_SHARE if answer > LONG else 1.0
    full = FULLY_MASKED_DEPENDENT if dependent else FULLY_MASKED
    draw = rng.random()
    if draw < full * share:
        return uniform_state(generator, answer, tokens, 1.0, not dependent)
    if draw < (full + UNIFORM) * share:
        ratio = rng.uniform(SMALLEST_RATIO, 1.0)
        return uniform_state(generator, answer, tokens, ratio, False)
    return _block_state(rng, generator, answer, tokens, dependent)


def uniform_state(
    generator: np.random.Generator, answer: int, tokens: int, ratio: float, counted: bool
) -> State:
    """Every token masked with the same probability; expected weights are those of all tokens."""
    hidden = generator.random(tokens) < ratio
    inside = np.arange(tokens) < answer
    return State(hidden, np.full(tokens, 1.0 / ratio), inside & counted)


def _block_state(
    rng: random.Random, generator: np.random.Generator, answer: int, tokens: int, dependent: bool
) -> State:
    start = BLOCK * rng.randrange(-(-answer // BLOCK))
    stop = min(start + BLOCK, tokens)
    last = min(stop, answer)  # of the answer in the block
    first = rng.randrange(start, last)
    only_prefix = rng.random() < ALL_AFTER_PREFIX
    ratio = 1.0 if only_prefix else rng.uniform(SMALLEST_RATIO, 1.0)
    places = np.arange(tokens)
    hidden = (places >= first) & ((places >= stop) | (generator.random(tokens) < ratio))
    hidden[first] = True
    suffix = rng.random() < SUFFIX
    if suffix:
        # What a model is sure of early is where the answer ends.
        only_padding = rng.random() < PADDING_ALONE
        hidden[last if only_padding else rng.randrange(first + 1, last + 1) : stop] = False
    # The block stands for the whole answer.
    shown = hidden[start:last].sum() / (last - start)
    factors = np.full(tokens, answer / (last - start) / max(shown, SMALLEST_RATIO))
    factors[first + NEXT_TOKENS : stop] *= LATER_WEIGHT if only_prefix else 1.0
    factors[stop:] = BEYOND_WEIGHT
    counted = (places == first) & (dependent and only_prefix and not suffix)
    return State(hidden, factors, counted)
