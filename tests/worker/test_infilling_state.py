"""What a request's state hands out with infilling, over the plain model."""

import json
from itertools import chain

from tests.decoding.plain_engine import GOLDEN, PlainEngine, engine_settings, make_state

MASK = json.loads((GOLDEN / "llada-mha" / "config.json").read_text())["mask_token_id"]
SETTINGS = engine_settings(MASK)
PROMPT = [10, 11, MASK, MASK, 12, 13, MASK, 14]
CANVAS = 12
STEPS = {"diffusion_steps": 8, "diffusion_block_length": 6}


def run(sent: list[int] | None = None, most: int | None = None, **extra_args: int):
    """The state at its end, and the chunks that its client got."""
    engine = PlainEngine.of_golden("llada-mha")
    state = make_state(SETTINGS, PROMPT, CANVAS, {**STEPS, **extra_args}, sent=sent or [])
    chunks: list[list[int]] = []
    while not state.finished and (most is None or len([*chain(*chunks)]) < most):
        chunks += engine.step([state])
    return state, chunks


def test_the_whole_sequence_is_handed_out_as_it_becomes_final() -> None:
    plain, answer = run()
    state, chunks = run(diffusion_infill=1)
    assert state.tokens.tolist() == plain.tokens.tolist()
    assert [*chain(*chunks)] == state.tokens.tolist()
    assert [*chain(*answer)] == state.tokens[len(PROMPT) :].tolist()
    # Each chunk ends before what may still change: the first one before a mask of the prompt.
    assert chunks[0][:2] == [10, 11]
    assert len(chunks[0]) < len(PROMPT)


def test_after_a_preemption_the_client_keeps_what_it_has() -> None:
    """Also where the same step would decide otherwise, as rounding may have it in another batch."""
    _, chunks = run(most=4, diffusion_infill=1)
    sent = [*chain(*chunks)]
    assert 4 <= len(sent) < len(PROMPT) + CANVAS
    other = [*sent[:2], (sent[2] + 1) % MASK, *sent[3:]]
    for had in (sent, other):
        state, rest = run(had, diffusion_infill=1)
        assert [*had, *chain(*rest)] == state.tokens.tolist()
        assert len(state.tokens) == len(PROMPT) + CANVAS
