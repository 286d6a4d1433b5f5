"""The canvas of a request is shown to those who ask for it, as it is."""

from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from vllm_sparsed.config.parameters import parse_server_settings
from vllm_sparsed.config.settings import EngineSettings, pattern_store_size
from vllm_sparsed.shown_canvas import ShownCanvas
from vllm_sparsed.worker.request_state import RequestState
from vllm_sparsed.worker.shown_canvases import KEPT, ShownCanvases

MASK = 9
SERVER = parse_server_settings(
    {"sparsed": {"block_size": 16}, "diffusion": {"show_canvas": True}}, "low_confidence"
)
SETTINGS = EngineSettings(
    server=SERVER,
    max_model_len=64,
    max_batch_tokens=256,
    mask_token_id=MASK,
    store=pattern_store_size(SERVER, 64, 256, True),
    crossover=None,
    graph_tokens=0,
    logit_shift=False,
)


def start(request_id: str, shown: bool = True, **parameters: Any) -> RequestState:
    """A request with a prompt of two tokens and a canvas of four."""
    if shown:
        parameters["diffusion_show_canvas"] = 1
    data = NewRequestData(
        req_id=request_id,
        prompt_token_ids=[1, 2],
        mm_features=[],
        sampling_params=SamplingParams(max_tokens=4, seed=0, extra_args=parameters),
        pooling_params=None,
        block_ids=(),
        num_computed_tokens=0,
        lora_request=None,
    )
    return RequestState.from_request(data, SETTINGS)


def decide(state: RequestState, *tokens: int) -> None:
    state.commit(np.array(tokens, dtype=np.int64))


def test_a_canvas_says_what_was_decided_when() -> None:
    state = start("chatcmpl-a-0123abcd", sparsed_skip=0)
    assert ShownCanvases().find([state], "chatcmpl-a") == [
        ShownCanvas(0, 0, 0, 4, None, False, [None] * 4, [0] * 4)
    ]
    decide(state, -1, 5, -1, -1)
    # A step that decides nothing runs no model.
    state.commit(None)
    (canvas,) = ShownCanvases().find([state], "chatcmpl-a")
    assert not canvas.is_sparse
    # A position that is decided to be the mask stays one.
    decide(state, 7, MASK, -1)
    (canvas,) = ShownCanvases().find([state], "chatcmpl-a")
    assert canvas == ShownCanvas(0, 0, 2, 4, 2, False, [7, 5, None, None], [2, 1, 0, 0])
    assert canvas.is_sparse
    assert canvas.num_decided == 2


def test_dense_requests_have_no_sparse_pass() -> None:
    state = start("a", sparsed_enabled=0)
    for token in range(4):
        decide(state, token, *[-1] * (3 - token))
    (canvas,) = ShownCanvases().find([state], "a")
    assert canvas.passes == 4
    assert canvas.sparse_from is None


def test_infilling_shows_the_whole_answer() -> None:
    state = start("a", diffusion_infill=1)
    decide(state, -1, 5, -1, -1)
    (canvas,) = ShownCanvases().find([state], "a")
    assert canvas.tokens == [1, 2, None, 5, None, None]
    assert canvas.decided_in == [0, 0, 0, 1, 0, 0]


def test_who_does_not_ask_is_not_shown() -> None:
    canvases = ShownCanvases()
    state = start("chatcmpl-a-0123abcd", shown=False)
    decide(state, 5, -1, -1, -1)
    assert canvases.find([state], "chatcmpl-a") == []
    canvases.end(state)
    assert canvases.find([], "chatcmpl-a") == []


@pytest.mark.parametrize(
    ("asked", "internal", "places"),
    [
        ("chatcmpl-a", ["chatcmpl-a-0123abcd"], [(0, 0)]),
        ("chatcmpl-a", ["chatcmpl-a"], [(0, 0)]),
        ("chatcmpl-a", ["1_chatcmpl-a-00000001", "0_chatcmpl-a-00000001"], [(0, 0), (0, 1)]),
        ("cmpl-a", ["cmpl-a-1-0123abcd", "cmpl-a-0-12345678"], [(0, 0), (1, 0)]),
        ("cmpl-a", ["1_cmpl-a-1-0123abcd", "0_cmpl-a-1-0123abcd"], [(1, 0), (1, 1)]),
        # Another request, and what a pattern would match.
        ("chatcmpl-a", ["chatcmpl-ab-0123abcd", "chatcmpl-a-b-0123abcd", "chatcmpl-a-1"], []),
        (".*", ["chatcmpl-a-0123abcd"], []),
        ("", ["chatcmpl-a-0123abcd"], []),
    ],
)
def test_ids_are_those_of_the_response(asked, internal, places) -> None:
    found = ShownCanvases().find([start(name) for name in internal], asked)
    assert [(canvas.prompt, canvas.index) for canvas in found] == places


def test_the_last_picture_stays_for_a_while() -> None:
    canvases = ShownCanvases()
    state = start("first")
    decide(state, 5, 6, 7, 8)
    canvases.end(state)
    (canvas,) = canvases.find([], "first")
    assert canvas.finished
    assert canvas.tokens == [5, 6, 7, 8]
    # After a preemption it runs again, from its first step.
    (again,) = canvases.find([start("first")], "first")
    assert not again.finished
    assert again.passes == 0
    for number in range(KEPT):
        canvases.end(start(f"later{number}"))
    assert canvases.find([], "first") == []
    assert len(canvases.find([], f"later{KEPT - 1}")) == 1
