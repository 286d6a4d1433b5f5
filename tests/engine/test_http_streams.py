"""A streamed request is refused with the status and the error that it gets without streaming."""

import json
from typing import Any

import httpx
import pytest

from tests.engine.golden_cases import load_cases
from tests.engine.http_server import MODEL_NAME, Server
from tests.engine.test_request_errors import CHAT, COMPLETIONS, RESPONSES, body_of

MESSAGES = "/v1/messages"
ROUTES = (COMPLETIONS, CHAT, RESPONSES, MESSAGES)
GOOD = load_cases("llada-mha")[0]

BAD_FIELDS: list[tuple[str, dict[str, Any]]] = [
    *((path, {"vllm_xargs": {"diffusion_steps": 0}}) for path in ROUTES),
    *((path, {"vllm_xargs": {"diffusion_step": 8}}) for path in ROUTES),
    (COMPLETIONS, {"min_p": 0.1, "temperature": 0.7}),
    (COMPLETIONS, {"repetition_penalty": 1.2}),
    (COMPLETIONS, {"prompt": [[10], [11], [99999]]}),
    (COMPLETIONS, {"prompt": [384]}),
    (COMPLETIONS, {"allowed_token_ids": [3, 4]}),
    (COMPLETIONS, {"logit_bias": {"3": 1}}),
    (COMPLETIONS, {"structured_outputs": {"regex": "w"}}),
    (CHAT, {"response_format": {"type": "json_object"}}),
    (CHAT, {"logprobs": True}),
    (CHAT, {"presence_penalty": 1}),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}}),
]


@pytest.mark.parametrize(
    ("path", "fields"),
    BAD_FIELDS,
    ids=[f"{path}-{json.dumps(fields)[:40]}" for path, fields in BAD_FIELDS],
)
def test_refused_as_without_streaming(server: Server, path: str, fields: dict[str, Any]) -> None:
    expected = server.post(path, body_of(path, **fields))
    streamed = server.post(path, body_of(path, **fields, stream=True))
    assert expected.status_code == 400, expected.text
    assert streamed.status_code == 400, streamed.text
    assert streamed.headers["content-type"] == expected.headers["content-type"]
    assert streamed.json() == expected.json()
    assert server.complete(GOOD)["token_ids"] == GOOD.expected


@pytest.mark.parametrize("path", ROUTES)
def test_a_good_stream_begins_before_its_first_block(server: Server, path: str) -> None:
    """The status arrives when the request is admitted, not when its first block is final."""
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    xargs = {"diffusion_steps": 300, "diffusion_block_length": 300}
    body = body_of(path, stream=True, vllm_xargs=xargs, **{limit: 300})
    running = "vllm:num_requests_running"
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=60) as response:
        assert response.status_code == 200
        assert server.metric(running) + server.metric("vllm:num_requests_waiting") == 1
        text = "".join(response.iter_text())
    assert text.count("data: ") > 1
    assert "error" not in text


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_parameter_beside_vllm_xargs_is_refused(server: Server, path: str, stream: bool) -> None:
    response = server.post(path, body_of(path, diffusion_steps=8, stream=stream))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith(
        'diffusion_steps must be inside vllm_xargs: {"vllm_xargs": {"diffusion_steps": 8}}.'
    )
    if path != MESSAGES:
        assert error["param"] == "diffusion_steps"


def test_words_of_a_prompt_are_no_parameters(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": '{"diffusion_steps": 8}'}]}
    assert server.post(CHAT, body_of(CHAT, **body)).status_code == 200
    body = {"model": MODEL_NAME, "prompt": 'a "diffusion_steps": 8', "max_tokens": 8}
    assert server.post(COMPLETIONS, body).status_code == 200
