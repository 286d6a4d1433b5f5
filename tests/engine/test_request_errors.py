"""Bad requests are refused by name, and none of them ends the engine."""

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.engine.golden_cases import load_cases
from tests.engine.http_server import MODEL_NAME, Server

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
GOOD = load_cases("llada-mha")[0]
NUM_FUZZED = 150

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
SCHEMA = {"name": "x", "schema": {"type": "object"}}

BAD_PARAMETERS = [
    ("diffusion_steps", 0),
    ("diffusion_steps", -1),
    ("diffusion_steps", 1.5),
    ("diffusion_steps", "many"),
    ("diffusion_steps", [1]),
    ("diffusion_steps", 2**40),
    ("diffusion_block_length", 0),
    ("diffusion_block_length", "x"),
    ("diffusion_alg", "greedy"),
    ("diffusion_alg", 3),
    ("diffusion_alg_temp", -0.1),
    ("diffusion_alg_temp", 1e30),
    ("diffusion_eps", 0),
    ("diffusion_eps", 1),
    ("diffusion_cfg_scale", -1),
    ("diffusion_cfg_scale", "1"),
    ("diffusion_top_p", 0),
    ("diffusion_top_k", -1),
    ("diffusion_logits_eos_inf", 2),
    ("diffusion_logits_eos_inf", "yes"),
    ("diffusion_confidence_eos_eot_inf", 7),
    ("sparsed_enabled", 3),
    ("sparsed_dense_if_faster", "auto"),
    ("sparsed_skip", 1),
    ("sparsed_skip", -0.1),
    ("sparsed_select", 0),
    ("sparsed_block_size", 8),
    ("sparsed_block_size", 48),
    ("sparsed_max_canvas", 8),
    ("diffusion_default_canvas", 8),
    ("diffusion_step", 8),
    ("steps", 8),
]

# Path, fields, and what the message must name.
BAD_FIELDS: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {"logprobs": 1}, "logprobs"),
    (COMPLETIONS, {"logprobs": 0}, "logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 1}, "prompt_logprobs"),
    (COMPLETIONS, {"logprob_token_ids": [3]}, "logprob"),
    (COMPLETIONS, {"echo": True, "logprobs": 1}, "logprobs"),
    (COMPLETIONS, {"presence_penalty": 0.5}, "presence_penalty"),
    (COMPLETIONS, {"frequency_penalty": -0.5}, "frequency_penalty"),
    (COMPLETIONS, {"repetition_penalty": 1.2}, "repetition_penalty"),
    (COMPLETIONS, {"logit_bias": {"3": 1}}, "logit_bias"),
    (COMPLETIONS, {"min_p": 0.1, "temperature": 0.7}, "min_p"),
    (COMPLETIONS, {"min_tokens": 2}, "min_tokens"),
    (COMPLETIONS, {"bad_words": ["w3"]}, "bad_words"),
    (COMPLETIONS, {"allowed_token_ids": [3, 4]}, "allowed_token_ids"),
    (COMPLETIONS, {"use_beam_search": True}, "beam search"),
    (COMPLETIONS, {"response_format": {"type": "json_object"}}, "response_format"),
    (COMPLETIONS, {"structured_outputs": {"regex": "w"}}, "structured_outputs"),
    (COMPLETIONS, {"structured_outputs": {"choice": ["w3"]}}, "structured_outputs"),
    (COMPLETIONS, {"thinking_token_budget": 5}, "thinking_token_budget"),
    (
        COMPLETIONS,
        {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2}},
        "repetition_detection",
    ),
    (COMPLETIONS, {"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    (COMPLETIONS, {"ec_transfer_params": {"a": 1}}, "ec_transfer_params"),
    (COMPLETIONS, {"prompt_embeds": "AAAA"}, "prompt_embeds"),
    (COMPLETIONS, {"suffix": "w3"}, "suffix"),
    (COMPLETIONS, {"prompt": [10] * 640}, "max_tokens"),
    (COMPLETIONS, {"prompt": [10] * 5000}, "context length"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [384]}, "384"),
    (COMPLETIONS, {"prompt": [[10], [99999]]}, "99999"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": 2**70}, "max_tokens"),
    (COMPLETIONS, {"n": 0}, "n must be"),
    (COMPLETIONS, {"temperature": -1}, "temperature"),
    (COMPLETIONS, {"top_p": 0}, "top_p"),
    (COMPLETIONS, {"top_k": -5}, "top_k"),
    (COMPLETIONS, {"top_k": 2**31, "temperature": 0.7}, "top_k"),
    (COMPLETIONS, {"top_k": 2**63, "temperature": 0.7}, "top_k"),
    (COMPLETIONS, {"top_k": 2**70, "temperature": 0.7}, "top_k"),
    (COMPLETIONS, {"stream_interval": 2**70}, "stream_interval"),
    (COMPLETIONS, {"seed": 2**64}, "seed"),
    (COMPLETIONS, {"priority": 2**63}, "priority"),
    (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (COMPLETIONS, {"stop": [""]}, "stop"),
    (COMPLETIONS, {"vllm_xargs": {"diffusion_steps": 2**70}}, "extra_args"),
    (COMPLETIONS, {"vllm_xargs": {"x" * 5000: 1}}, "is not a parameter"),
    (CHAT, {"logprobs": True}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 2}, "logprobs"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"response_format": {"type": "json_schema", "json_schema": SCHEMA}}, "response_format"),
    (CHAT, {"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"use_beam_search": True}, "beam search"),
    (CHAT, {"presence_penalty": 1}, "presence_penalty"),
    (CHAT, {"vllm_xargs": {"diffusion_steps": 0}}, "diffusion_steps"),
    (CHAT, {"messages": []}, "message"),
    (CHAT, {"messages": [{"role": "user", "content": "w3 " * 700}]}, "context length"),
    (RESPONSES, {"vllm_xargs": {"diffusion_steps": 0}}, "diffusion_steps"),
    (
        RESPONSES,
        {"top_logprobs": 3, "include": ["message.output_text.logprobs"]},
        "logprobs",
    ),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", **SCHEMA}}},
        "response_format",
    ),
]


def body_of(path: str, **fields: Any) -> dict[str, Any]:
    """A good body of the route, with `fields` added or replaced."""
    message = {"role": "user", "content": "w20 w21"}
    routes: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": [10, 11, 12], "max_tokens": 8},
        CHAT: {"messages": [message], "max_tokens": 8},
        RESPONSES: {"input": "w20 w21", "max_output_tokens": 8},
        "/tokenize": {"prompt": "w3 w4"},
        "/v1/messages": {"messages": [message], "max_tokens": 8},
        "/generative_scoring": {"query": "w3", "items": ["w4"], "label_token_ids": [3, 4]},
    }
    return {"model": MODEL_NAME, **routes[path], **fields}


@pytest.fixture(autouse=True)
def _serves_afterwards(server: Server) -> Iterator[None]:
    yield
    assert server.complete(GOOD)["token_ids"] == GOOD.expected


def assert_refused(response: httpx.Response, named: str) -> None:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert named in f"{error['param']} {error['message']}"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, RESPONSES])
def test_good_body(server: Server, path: str) -> None:
    """The bodies that the other tests spoil are good ones."""
    assert server.post(path, body_of(path)).status_code == 200


@pytest.mark.parametrize(
    ("name", "value"), BAD_PARAMETERS, ids=[f"{k}={v}" for k, v in BAD_PARAMETERS]
)
def test_bad_parameter(server: Server, name: str, value: Any) -> None:
    assert_refused(server.post(COMPLETIONS, body_of(COMPLETIONS, vllm_xargs={name: value})), name)


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    BAD_FIELDS,
    ids=[f"{path}-{json.dumps(fields)[:40]}" for path, fields, _ in BAD_FIELDS],
)
def test_bad_field(server: Server, path: str, fields: dict[str, Any], named: str) -> None:
    assert_refused(server.post(path, body_of(path, **fields)), named)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "golden", "prompt": [NaN]}',
        b'{"model": "golden", "prompt": [3], "temperature": Infinity}',
        b'{"model": "golden", "prompt": [3], "temperature": NaN}',
        b"[" * 100_000,
        b'{"prompt":' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=lambda content: repr(content[:30]),
)
def test_body_that_is_no_request(server: Server, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{server.url}{COMPLETIONS}", content=content, headers=headers)
    assert 400 <= response.status_code < 500, response.text


def test_beyond_the_prompt_a_request_is_clamped(server: Server) -> None:
    """Steps and blocks larger than the canvas are no error: the rules of the parameter table."""
    xargs = {"diffusion_steps": 2**31 - 1, "diffusion_block_length": 2**31 - 1}
    response = server.post(COMPLETIONS, body_of(COMPLETIONS, vllm_xargs=xargs))
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63)])
@pytest.mark.parametrize("n", [2, 3])
def test_seeds_at_the_ends_of_their_range(server: Server, seed: int, n: int) -> None:
    """vLLM gives each of n choices the next seed, past the end of 64 bits too."""
    body = body_of(COMPLETIONS, n=n, seed=seed, temperature=1, return_token_ids=True)
    answers = []
    for _ in range(2):
        response = server.post(COMPLETIONS, body)
        assert response.status_code == 200, response.text
        answers.append([choice["token_ids"] for choice in response.json()["choices"]])
    assert answers[0] == answers[1]
    assert len({tuple(tokens) for tokens in answers[0]}) == n


NUMBERS: list[Any] = [
    *(0, 1, 2, 3, -1, 0.5, -0.5, 1.0, 1e-300, 1e300, 2**31, 2**63, 2**64, 2**200),
    *(True, None, "3", "", [], {}, [1], [[1]], {"a": 1}),
]
PARAMETER_VALUES: list[Any] = [
    *(0, 1, 2, 7, 16, 32, 0.1, 0.5, 1e-300, 1e6, 2**31 - 1, 2**63, -1),
    *("random", "origin", "entropy", "topk_margin", "maskgit_plus", "true", "", [3], ["x"]),
]
NAMES = [
    *("diffusion_steps", "diffusion_block_length", "diffusion_alg", "diffusion_alg_temp"),
    *("diffusion_eps", "diffusion_cfg_scale", "diffusion_logits_eos_inf", "sparsed_enabled"),
    *("diffusion_confidence_eos_eot_inf", "sparsed_skip", "sparsed_select", "sparsed_block_size"),
    "sparsed_dense_if_faster",
    *("kv_transfer_params", "session_id", "logits"),
]
FIELDS: dict[str, list[Any]] = {
    "prompt": ["w3 w4", "", [3, 4], [[3], [4]], [383] * 9, [3] * 639, [2**40], ["w3", 4], {}],
    "input": ["w3", "", [], [3], {"role": "user"}],
    "messages": [[], [{}], "w3", [{"role": "x", "content": "w3"}], [{"role": "user"}]],
    "max_tokens": [1, 5, 17, 10**9, *NUMBERS],
    "max_output_tokens": [1, 5, 17, 10**9, *NUMBERS],
    # A large n with a temperature is a legitimate request for much work.
    "n": [1, 2, 3, 0, -1, 10**6, "2", None, 1.5],
    "stream": [True, False, "x"],
    "stop": ["w5", ["w5", "w6"], [""], [3], {}, None],
    "stop_token_ids": [[3], [2**40], [-1], "x", None, [[3]]],
    "tools": [TOOLS, [], "x", [{}]],
    "tool_choice": ["auto", "none", "required", {}],
    "response_format": [{"type": "text"}, {"type": "json_object"}, {"type": "x"}, "x"],
    "structured_outputs": [{"json": {}}, {"regex": "("}, {"grammar": "x"}, {}],
    "logit_bias": [{"3": 1}, {"x": 1}, {"3": 1e300}, {}, []],
    "stream_options": [{"include_usage": True}, {}, {"continuous_usage_stats": True}],
    "model": [MODEL_NAME, "other", 3, None],
    "request_id": ["same", "", 3, "a/b\n"],
    "label_token_ids": [[3, 4], [2**40], [-1], "x"],
    **dict.fromkeys(
        [
            *("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "priority"),
            *("frequency_penalty", "repetition_penalty", "logprobs", "top_logprobs", "echo"),
            *("prompt_logprobs", "min_tokens", "ignore_eos", "truncate_prompt_tokens", "suffix"),
            *("stream_interval", "cache_salt", "use_beam_search", "length_penalty", "best_of"),
            *("skip_special_tokens", "return_token_ids", "include_stop_str_in_output", "user"),
            *("routed_experts_prompt_start", "thinking_token_budget", "allowed_token_ids"),
            *("bad_words", "session_id", "watermarking", "logprob_token_ids", "lora"),
        ],
        NUMBERS,
    ),
}
PATHS = [COMPLETIONS] * 5 + [CHAT] * 3 + [RESPONSES, "/tokenize", "/v1/messages"]
PATHS += ["/generative_scoring"]


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(PATHS)
    fields = {name: rng.choice(FIELDS[name]) for name in rng.sample(sorted(FIELDS), 2)}
    if rng.random() < 0.7:
        chosen = rng.sample(NAMES, rng.choice([1, 1, 2, 3]))
        fields["vllm_xargs"] = {name: rng.choice(PARAMETER_VALUES) for name in chosen}
    return path, body_of(path, **fields)


def test_random_bodies(server: Server) -> None:
    """Never a server error, and a good request among them keeps its tokens."""
    rng = random.Random(2)
    bodies = [random_body(rng) for _ in range(NUM_FUZZED)]
    done = threading.Event()
    wrong: list[list[int]] = []

    def keep_serving() -> None:
        while not done.is_set():
            tokens = server.complete(GOOD)["token_ids"]
            if tokens != GOOD.expected:
                wrong.append(tokens)

    def send(request: tuple[str, dict[str, Any]]) -> int:
        return server.post(*request).status_code

    with ThreadPoolExecutor(4) as pool:
        serving = pool.submit(keep_serving)
        try:
            statuses = list(pool.map(send, bodies))
        finally:
            done.set()
        serving.result()
    failed = [
        (status, path, json.dumps(body)[:400])
        for status, (path, body) in zip(statuses, bodies, strict=True)
        if status >= 500
    ]
    assert not failed, failed[:3]
    assert not wrong
    assert {200, 400} <= set(statuses), "the bodies are neither all good nor all bad"
