"""Masks inside a prompt are filled and returned where that is asked for, and refused elsewhere."""

import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import httpx
import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.engine.golden_cases import load_cases
from tests.engine.http_server import Server, completion_body
from tests.engine.test_request_errors import CHAT, COMPLETIONS, RESPONSES, body_of

MASK = 383
EOS = 2
CASE = next(case for case in load_cases("llada-mha") if case.block_mask is None)
HOLES = [*CASE.prompt[:5], MASK, MASK, EOS, *CASE.prompt[8:12], MASK, *CASE.prompt[13:]]
XARGS = {**CASE.extra_args, "diffusion_infill": 1}
MESSAGES = "/v1/messages"


def assert_filled(tokens: list[int], prompt: list[int], canvas: int) -> None:
    assert len(tokens) == len(prompt) + canvas
    given = [(token, filled) for token, filled in zip(prompt, tokens, strict=False)]
    assert all(token in (filled, MASK) for token, filled in given)
    assert MASK not in tokens


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", f"{server.url}{path}", json=body, timeout=600) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if "data: " in line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_completion(server: Server) -> None:
    tokens = server.complete(CASE, prompt=HOLES, vllm_xargs=XARGS)["token_ids"]
    assert_filled(tokens, HOLES, CASE.params["gen"])
    body = completion_body(CASE, prompt=HOLES, vllm_xargs=XARGS, stream=True)
    chunks = [
        event["choices"][0].get("token_ids") or [] for event in events(server, COMPLETIONS, body)
    ]
    assert [*chain(*chunks)] == tokens
    # What stands before the first hole is final at once.
    assert chunks[0][:5] == HOLES[:5]
    assert server.complete(CASE)["token_ids"] == CASE.expected


def test_without_holes_it_is_the_answer_after_the_prompt(server: Server) -> None:
    tokens = server.complete(CASE, vllm_xargs=XARGS)["token_ids"]
    assert tokens == [*CASE.prompt, *CASE.expected]


def test_an_end_token_in_the_prompt_stops_nothing(server: Server) -> None:
    """One that is decided behind the prompt does, as in any request."""
    answer = server.complete(CASE, prompt=HOLES, vllm_xargs=XARGS, ignore_eos=False)
    whole = server.complete(CASE, prompt=HOLES, vllm_xargs=XARGS)["token_ids"]
    assert len(answer["token_ids"]) > len(HOLES)
    assert answer["token_ids"] == whole[: len(answer["token_ids"])]


def test_more_than_half_the_context(server: Server) -> None:
    prompt = (HOLES * 40)[:500]
    tokens = server.complete(
        CASE, prompt=prompt, max_tokens=100, vllm_xargs={**XARGS, "diffusion_steps": 8}
    )["token_ids"]
    assert_filled(tokens, prompt, 100)


# The tokenizer takes w1 and w2, which are special, for the beginning of longer words.
TEXT = "w30 w383 w32"


@pytest.mark.parametrize("stream", [False, True])
def test_chat(server: Server, stream: bool) -> None:
    messages = [{"role": "user", "content": TEXT}]
    body = body_of(CHAT, messages=messages, vllm_xargs={"diffusion_infill": 1}, stream=stream)
    body |= {"ignore_eos": True, "skip_special_tokens": False}
    if stream:
        deltas = [event["choices"][0]["delta"] for event in events(server, CHAT, body)]
        text = "".join(delta.get("content") or "" for delta in deltas)
    else:
        text = server.post(CHAT, body).json()["choices"][0]["message"]["content"]
    words = text.split()
    first = words.index("w30")
    assert words[first + 1] != "w383"
    assert words[first + 2] == "w32"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES, MESSAGES])
def test_a_mask_is_refused_where_nobody_asks(server: Server, path: str, stream: bool) -> None:
    message = [{"role": "user", "content": TEXT}]
    prompts: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": TEXT},
        CHAT: {"messages": message},
        RESPONSES: {"input": TEXT},
        MESSAGES: {"messages": message},
    }
    response = server.post(path, body_of(path, stream=stream, **prompts[path]))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert "the prompt holds the mask token w383 (383) at position" in error["message"]
    assert "diffusion_infill" in error["message"]
    assert server.complete(CASE)["token_ids"] == CASE.expected


def test_stop_strings_are_refused(server: Server) -> None:
    body = body_of(COMPLETIONS, stop=["w5"], vllm_xargs={"diffusion_infill": 1})
    response = server.post(COMPLETIONS, body)
    assert response.status_code == 400
    assert "stop does not go with diffusion_infill" in response.json()["error"]["message"]


def test_offline(engine: Callable[..., LLM]) -> None:
    llm = engine("llada-mha")

    def params(**extra_args: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=CASE.params["gen"],
            ignore_eos=True,
            detokenize=False,
            extra_args={**CASE.extra_args, **extra_args},
        )

    prompts = [{"prompt_token_ids": HOLES}, {"prompt_token_ids": CASE.prompt}]
    filled, beside = llm.generate(
        prompts, [params(diffusion_infill=True), params()], use_tqdm=False
    )
    assert_filled(list(filled.outputs[0].token_ids), HOLES, CASE.params["gen"])
    assert list(beside.outputs[0].token_ids) == CASE.expected
    with pytest.raises(VLLMValidationError, match="mask token 383 at position 5"):
        llm.generate(prompts[0], params(), use_tqdm=False)
