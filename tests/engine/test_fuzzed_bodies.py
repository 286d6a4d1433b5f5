"""Random bodies against every route: no server error, no dead engine, others' tokens unchanged."""

import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.golden_cases import load_cases
from tests.engine.http_server import MODEL_NAME, SPARSED, Server
from tests.engine.test_request_errors import CHAT, COMPLETIONS, RESPONSES, TOOLS, body_of

GOOD = load_cases("llada-mha")[0]
NUM_BODIES = 240
NUM_LINES = 60

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
    *("sparsed_dense_if_faster", "diffusion_infill", "diffusion_top_p", "diffusion_top_k"),
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

MESSAGES = "/v1/messages"
GENERATE = "/inference/v1/generate"
# Routes that generate, more often; then those that only look at a prompt, or that this model lacks.
PATHS = [COMPLETIONS] * 6 + [CHAT] * 4 + [RESPONSES] * 3 + [MESSAGES] * 3 + [GENERATE] * 2
PATHS += ["/generative_scoring", "/invocations", "/v1/chat/completions/batch", "/cohere/v2/chat"]
PATHS += ["/tokenize", "/detokenize", "/v1/messages/count_tokens", "/v1/completions/render"]
PATHS += ["/v1/chat/completions/render", "/v1/embeddings", "/pooling", "/classify", "/score"]
PATHS += ["/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"]


def good_body(path: str) -> dict[str, Any]:
    """One that the route understands; the routes of pooling models get a completion's."""
    chat = body_of(CHAT)
    bodies: dict[str, dict[str, Any]] = {
        GENERATE: {"token_ids": [10, 11], "sampling_params": {"max_tokens": 8}},
        "/v1/chat/completions/batch": {**chat, "messages": [chat["messages"]] * 2},
        "/detokenize": {"model": MODEL_NAME, "tokens": [10, 11]},
        "/v1/embeddings": {"model": MODEL_NAME, "input": "w3 w4"},
    }
    if path in bodies:
        return bodies[path]
    if path in (COMPLETIONS, RESPONSES, "/tokenize", MESSAGES, "/generative_scoring"):
        return body_of(path)
    return chat if "chat" in path or "messages" in path else body_of(COMPLETIONS)


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(PATHS)
    spoilt = rng.sample(sorted(FIELDS), rng.choice([0, 1, 1, 2]))
    fields = {name: rng.choice(FIELDS[name]) for name in spoilt}
    if rng.random() < 0.6:
        chosen = rng.sample(NAMES, rng.choice([1, 1, 2, 3]))
        fields["vllm_xargs"] = {name: rng.choice(PARAMETER_VALUES) for name in chosen}
    if rng.random() < 0.1:
        fields[rng.choice(NAMES)] = rng.choice(PARAMETER_VALUES)
    if rng.random() < 0.5:
        fields["stream"] = True
    body = good_body(path)
    if path == GENERATE:
        # Its parameters are vLLM's own, without vllm_xargs between.
        given = {**fields.pop("vllm_xargs", {}), **fields}
        body["sampling_params"] |= {"extra_args": given} if rng.random() < 0.5 else fields
        return path, body
    return path, {**body, **fields}


def send(server: Server, path: str, body: dict[str, Any]) -> tuple[int, str]:
    """Status and text of the whole answer; a cut connection is a server error."""
    try:
        response = server.post(path, body)
        return response.status_code, response.text
    except httpx.RemoteProtocolError as error:
        return 599, str(error)


def test_random_bodies(server: Server) -> None:
    rng = random.Random(2)
    bodies = [random_body(rng) for _ in range(NUM_BODIES)]
    done = threading.Event()
    wrong: list[list[int]] = []

    def keep_serving() -> None:
        while not done.is_set():
            tokens = server.complete(GOOD)["token_ids"]
            if tokens != GOOD.expected:
                wrong.append(tokens)

    with ThreadPoolExecutor(5) as pool:
        serving = pool.submit(keep_serving)
        try:
            answers = list(pool.map(lambda request: send(server, *request), bodies))
        finally:
            done.set()
        serving.result()
    failed = [
        (status, path, json.dumps(body)[:400], text[:400])
        for (status, text), (path, body) in zip(answers, bodies, strict=True)
        if status >= 500 or '"code": 5' in text or '"code":5' in text
    ]
    assert not failed, failed[:5]
    assert not wrong
    streamed = [text.startswith(("data: ", "event: ")) for _, text in answers]
    assert sum(streamed) > 10, "too few bodies are good and streamed"
    assert {200, 400} <= {status for status, _ in answers}
    assert server.complete(GOOD)["token_ids"] == GOOD.expected


@pytest.mark.slow  # an engine of its own
def test_random_lines_of_a_batch_file(checkpoint: Path, tmp_path: Path) -> None:
    """Each line has an answer or an error of its own, and the good ones keep their tokens."""
    rng = random.Random(3)
    lines = []
    for i in range(NUM_LINES):
        path, body = CHAT, body_of(CHAT, temperature=0)
        if i % 4:
            path, body = random_body(rng)
            while path not in (CHAT, "/v1/embeddings", "/score", "/rerank"):
                path, body = random_body(rng)
            body.pop("stream", None)
        lines.append({"custom_id": str(i), "method": "POST", "url": path, "body": body})
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    # Lines that are no requests at all end the command, for any model: that is vLLM's own check.
    source.write_text("".join(json.dumps(line) + "\n" for line in lines if is_request(line)))
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("run-batch", "-i", str(source), "-o", str(target), "--model", str(checkpoint)),
        *("--served-model-name", MODEL_NAME, "--attention-backend", "sparsed"),
        *("--dtype", "float32", "--max-model-len", "640"),
        *("--additional-config", json.dumps({"sparsed": SPARSED})),
    ]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(answers) == len(source.read_text().splitlines())
    statuses = {a["custom_id"]: a["response"]["status_code"] for a in answers}
    assert all(status < 500 for status in statuses.values()), statuses
    good = [a for a in answers if int(a["custom_id"]) % 4 == 0]
    assert {statuses[a["custom_id"]] for a in good} == {200}
    texts = {a["response"]["body"]["choices"][0]["message"]["content"] for a in good}
    assert len(texts) == 1
    assert 400 in statuses.values()


def is_request(line: dict[str, Any]) -> bool:
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    try:
        BatchRequestInput.model_validate(line)
    except Exception:
        return False
    return True
