"""Where a preempted request starts again: what the rest of its run saw must be the same."""

import numpy as np
import pytest

from tests.decoding.plain_engine import engine_settings, make_state
from vllm_sparsed.worker.request_state import RequestState

MASK = 383
SETTINGS = engine_settings(MASK)


def commit(state: RequestState, *left_over: int) -> None:
    """A step that decides all candidates, but for positions that it decides to be the mask."""
    tokens = np.where(np.isin(state.candidates, left_over), MASK, 7)
    state.commit(tokens)


def blocks_of_four() -> RequestState:
    """A canvas of three blocks of four, a step for each."""
    return make_state(SETTINGS, [10, 11], 12, {"diffusion_block_length": 4, "diffusion_steps": 3})


@pytest.mark.parametrize(("left_over", "whole"), [((), 1), ((3,), 0)])
def test_a_block_that_began_with_masks_before_it_is_not_the_first_again(
    left_over: tuple[int, ...], whole: int
) -> None:
    state = blocks_of_four()
    commit(state, *left_over)
    assert (state.block, state.whole_block) == (1, whole)
    commit(state)
    # Now the client may have two blocks, whatever the second step saw.
    assert (state.block, state.whole_block) == (2, 2)


def test_it_starts_again_no_later_than_the_last_whole_block() -> None:
    sent = [7] * 6
    parameters = {"diffusion_block_length": 4, "diffusion_steps": 3}
    assert make_state(SETTINGS, [10, 11], 12, parameters, sent=sent).block == 1
    again = make_state(SETTINGS, [10, 11], 12, parameters, sent=sent, last_resume=0)
    assert again.block == 0
    assert (again.tokens[2:] == MASK).all()
