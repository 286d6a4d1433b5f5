"""A served golden checkpoint behaves over HTTP as any other model does in vLLM."""

import gzip
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.engine.golden_cases import GoldenCase, load_cases
from tests.engine.http_server import MODEL_NAME, Server, completion_body
from tests.engine.inspection import MAX_NUM_SEQS
from tests.golden.parallel_cases import ParallelCase, parallel_cases

CASES = load_cases("llada-mha")
DENSE_CASES = [case for case in CASES if case.block_mask is None]
EOS = 2
BLOCKS_OF_16 = CASES[3]
"""64 tokens in four blocks and 32 steps, dense."""

SLOW = {
    "max_tokens": 120,
    "vllm_xargs": {
        "diffusion_steps": 120,
        "diffusion_block_length": 30,
        "sparsed_skip": 0.3,
    },
}
"""Changes to a case that make it take 120 steps."""

RUNNING = "vllm:num_requests_running"
STEPS = "vllm:diffusion_num_denoising_steps_total"


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)


def stream(client: OpenAI, case: GoldenCase | ParallelCase) -> list[list[int]]:
    """Token ids of each chunk."""
    chunks = client.completions.create(
        model=MODEL_NAME,
        prompt=case.prompt,
        max_tokens=case.params["gen"],
        temperature=0.0,
        stream=True,
        extra_body={
            "ignore_eos": True,
            "return_token_ids": True,
            "vllm_xargs": case.extra_args,
        },
    )
    extras = [chunk.choices[0].model_extra or {} for chunk in chunks]
    return [extra["token_ids"] for extra in extras if extra.get("token_ids")]


def test_several_tokens_a_pass_are_streamed(client: OpenAI) -> None:
    """All at once; what a chunk holds depends on the decisions alone."""
    cases = parallel_cases("llada-mha")
    with ThreadPoolExecutor(8) as pool:
        chunks = list(pool.map(lambda case: stream(client, case), cases))
    assert [list(chain(*parts)) for parts in chunks] == [case.expected for case in cases]
    for case, parts in zip(cases, chunks, strict=True):
        assert len(parts) <= len(case.history)


class TooLateError(Exception):
    """The request had ended before the test could do anything to it."""


def wait_for(condition: Callable[[], bool], ended: Callable[[], bool] = lambda: False) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if ended():
            raise TooLateError
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


def in_time(attempt: Callable[[], None]) -> None:
    """Try a few times: on a busy machine this process may not run for as long as a request does."""
    for _ in range(6):
        try:
            return attempt()
        except TooLateError:
            continue
    pytest.fail("each request had ended before anything could be done to it")


def idle(server: Server) -> bool:
    return server.metric(RUNNING) == 0 and server.metric("vllm:num_requests_waiting") == 0


@pytest.fixture(autouse=True)
def _idle_afterwards(server: Server) -> Iterator[None]:
    """Whatever a test did, nothing of it goes on."""
    yield
    wait_for(lambda: idle(server))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_streamed_tokens(client: OpenAI, case: GoldenCase) -> None:
    assert [*chain(*stream(client, case))] == case.expected


def test_each_block_is_streamed_when_it_is_final(client: OpenAI) -> None:
    chunks = stream(client, BLOCKS_OF_16)
    assert len(chunks) >= 4
    assert [*chain(*chunks)] == BLOCKS_OF_16.expected
    ends = {sum(map(len, chunks[: i + 1])) for i in range(len(chunks))}
    assert {16, 32, 48, 64} <= ends, "no chunk reaches over the end of a block"


def test_text_is_that_of_the_tokens(server: Server) -> None:
    case = DENSE_CASES[0]
    choice = server.complete(case, skip_special_tokens=False)
    assert choice["text"].split() == [f"w{token}" for token in case.expected]


def test_all_cases_at_once(client: OpenAI) -> None:
    with ThreadPoolExecutor(2 * len(CASES)) as pool:
        results = list(pool.map(lambda case: stream(client, case), CASES * 2))
    assert [[*chain(*chunks)] for chunks in results] == [case.expected for case in CASES * 2]


def test_chat_without_max_tokens_gets_the_default_canvas(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": "w20 w21 w22"}],
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    # w10 w20 w21 w22 w11 w12 and what the template's spaces are tokenized to.
    tokens = client.post(
        "/chat/completions",
        cast_to=dict,
        body={
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": "w20 w21 w22"}],
            "max_tokens": 1,
            "return_token_ids": True,
        },
    )["prompt_token_ids"]
    assert answer.usage.prompt_tokens == len(tokens)
    assert answer.usage.completion_tokens == 128
    assert answer.usage.total_tokens == len(tokens) + 128
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("max_tokens", [1, 7, 33, 600])
def test_max_tokens(server: Server, max_tokens: int) -> None:
    response = server.post(
        "/v1/completions",
        completion_body(DENSE_CASES[0], max_tokens=max_tokens, vllm_xargs={"diffusion_steps": 8}),
    ).json()
    assert len(response["choices"][0]["token_ids"]) == max_tokens
    assert response["usage"]["completion_tokens"] == max_tokens
    assert response["usage"]["prompt_tokens"] == len(DENSE_CASES[0].prompt)


def test_more_than_the_context_holds_is_clamped(server: Server) -> None:
    choice = server.complete(DENSE_CASES[0], max_tokens=640, vllm_xargs={"diffusion_steps": 4})
    assert len(choice["token_ids"]) == 640 - len(DENSE_CASES[0].prompt)


def test_two_choices_with_a_seed(server: Server) -> None:
    case = DENSE_CASES[1]

    def choices(**changes: Any) -> list[list[int]]:
        response = server.post(
            "/v1/completions", completion_body(case, temperature=0.8, **changes)
        ).json()
        assert response["usage"]["completion_tokens"] == 32 * len(response["choices"])
        return [choice["token_ids"] for choice in response["choices"]]

    first, second = choices(n=2, seed=7)
    assert first != second
    assert choices(n=2, seed=7) == [first, second]
    assert [choices(seed=7), choices(seed=8)] == [[first], [second]]


def test_stop_string_ends_the_request_early(server: Server) -> None:
    in_time(lambda: check_stop_string(server))


def check_stop_string(server: Server) -> None:
    case = BLOCKS_OF_16
    whole = server.complete(case)["text"]
    stop = f"w{case.expected[5]}"
    before = server.metric(STEPS)
    choice = server.complete(case, stop=[stop])
    assert choice["text"] == whole[: whole.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    wait_for(lambda: idle(server))
    # The stop word is in the first of four blocks, which take 8 steps each; one more block may
    # have begun before the front end's abort arrived.
    steps = server.metric(STEPS) - before
    if steps == 32:
        raise TooLateError
    assert steps < 24


def test_stop_token_id(server: Server) -> None:
    case = BLOCKS_OF_16
    stop = case.expected[20]
    choice = server.complete(case, stop_token_ids=[stop])
    end = case.expected.index(stop) + 1
    assert choice["token_ids"] == case.expected[:end]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_end_of_sequence_token_ends_a_request(server: Server) -> None:
    """A sampled answer that contains the end token is cut there, and computed no further."""
    case = BLOCKS_OF_16
    for seed in range(40):
        options = {"temperature": 2.0, "seed": seed}
        tokens = server.complete(case, **options)["token_ids"]
        if EOS in tokens[:32]:
            break
    else:
        pytest.fail("no seed samples the end token in the first half")
    before = server.metric(STEPS)
    choice = server.complete(case, ignore_eos=False, **options)
    assert choice["token_ids"] == tokens[: tokens.index(EOS) + 1]
    assert choice["finish_reason"] == "stop"
    wait_for(lambda: idle(server))
    assert server.metric(STEPS) - before <= 16


def test_a_disconnected_client_stops_the_computation(server: Server) -> None:
    in_time(lambda: check_disconnection(server))


def check_disconnection(server: Server) -> None:
    body = completion_body(
        DENSE_CASES[0],
        max_tokens=600,
        stream=True,
        vllm_xargs={"diffusion_steps": 600, "diffusion_block_length": 4},
    )
    before = server.metric(STEPS)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data:")
    wait_for(lambda: idle(server))
    done = server.metric(STEPS) - before
    # The first token takes one step, all of them take 600.
    if done == 600:
        raise TooLateError
    assert 1 <= done < 600
    time.sleep(0.5)
    assert server.metric(STEPS) - before == done
    assert server.complete(DENSE_CASES[0])["token_ids"] == DENSE_CASES[0].expected


def test_priority(server: Server) -> None:
    """Requests take all places; when one is free, the urgent one of those that wait gets it."""
    in_time(lambda: check_priority(server))


def check_priority(server: Server) -> None:
    rng = random.Random(0)
    finished: list[str] = []

    def send(name: str, priority: int, canvas: int, steps: int) -> None:
        body = completion_body(
            DENSE_CASES[0],
            prompt=[rng.randrange(3, 383) for _ in range(10)],
            max_tokens=canvas,
            priority=priority,
            vllm_xargs={"diffusion_steps": steps, "sparsed_enabled": 0},
        )
        assert server.post("/v1/completions", body).status_code == 200
        finished.append(name)

    threads: list[threading.Thread] = []

    def start(*arguments: Any) -> None:
        threads.append(threading.Thread(target=send, args=arguments))
        threads[-1].start()

    def ended() -> bool:
        return bool(finished)

    try:
        for i in range(MAX_NUM_SEQS - 1):
            start(f"long-{i}", 0, 240, 240)
        start("shorter", 0, 240, 160)
        wait_for(lambda: server.metric(RUNNING) == MAX_NUM_SEQS, ended)
        for i in range(3):
            start(f"later-{i}", 5, 20, 4)
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 3, ended)
        start("urgent", -5, 20, 4)
        wait_for(lambda: server.metric("vllm:num_requests_waiting") == 4, ended)
    finally:
        for thread in threads:
            thread.join()
    assert finished.index("urgent") < min(finished.index(f"later-{i}") for i in range(3))


@pytest.fixture(scope="module")
def slow_answer(server: Server) -> list[int]:
    """What the slow request gives when nothing interrupts it."""
    tokens: list[int] = server.complete(CASES[7], **SLOW)["token_ids"]
    assert len(set(tokens)) > 10
    return tokens


def test_pause_and_resume(server: Server, slow_answer: list[int]) -> None:
    def attempt() -> None:
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(server.complete, CASES[7], **SLOW)
            wait_for(lambda: server.metric(RUNNING) == 1, running.done)
            assert server.post("/pause?mode=keep", None).json() == {"status": "paused"}
            try:
                assert server.get("/is_paused").json() == {"is_paused": True}
                time.sleep(0.3)
                if running.done():
                    raise TooLateError
                waiting = pool.submit(server.complete, DENSE_CASES[0])
                time.sleep(0.3)
                steps = server.metric(STEPS)
                time.sleep(0.3)
                assert server.metric(STEPS) == steps, "nothing is computed while paused"
                assert not running.done() and not waiting.done()
            finally:
                assert server.post("/resume", None).json() == {"status": "resumed"}
            assert running.result()["token_ids"] == slow_answer
            assert waiting.result()["token_ids"] == DENSE_CASES[0].expected

    in_time(attempt)


def test_pause_that_aborts(server: Server) -> None:
    def attempt() -> None:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                server.complete, DENSE_CASES[0], max_tokens=600, vllm_xargs={"diffusion_steps": 600}
            )
            wait_for(lambda: server.metric(RUNNING) == 1, running.done)
            assert server.post("/pause", None).status_code == 200
            result = running.result()
            assert server.post("/resume", None).status_code == 200
        if len(result["token_ids"]) == 600:
            raise TooLateError
        assert result["finish_reason"] == "abort"

    in_time(attempt)
    assert server.complete(DENSE_CASES[0])["token_ids"] == DENSE_CASES[0].expected


def test_preemption_by_resetting_the_prefix_cache(server: Server, slow_answer: list[int]) -> None:
    """The only way to preempt without a key/value cache: requests start again, and come out."""

    def attempt() -> None:
        before = server.metric(STEPS)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.complete, CASES[7], **SLOW)
            wait_for(lambda: server.metric(STEPS) > before + 5, running.done)
            path = "/reset_prefix_cache?reset_running_requests=true"
            assert server.post(path, None).status_code == 200
            assert running.result()["token_ids"] == slow_answer
        taken = server.metric(STEPS) - before
        if taken == 120:
            raise TooLateError
        assert taken > 120 + 5, "it started again"

    in_time(attempt)


def test_torch_profiler(server: Server, profile_folder: Path) -> None:
    assert server.post("/start_profile", None).status_code == 200
    assert server.complete(CASES[9])["token_ids"] == CASES[9].expected
    assert server.post("/stop_profile", None).status_code == 200
    names: set[str] = set()
    for path in profile_folder.rglob("*.gz"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names |= {event.get("name", "") for event in events}
    assert "aten::scaled_dot_product_attention" in names


def test_guided_request_reports_its_usage(server: Server) -> None:
    """Guidance runs a second sequence; the client's counts do not show it."""
    response = server.post(
        "/v1/completions",
        completion_body(
            DENSE_CASES[0], vllm_xargs={"diffusion_cfg_scale": 1.5, "diffusion_steps": 8}
        ),
    ).json()
    assert response["usage"]["prompt_tokens"] == len(DENSE_CASES[0].prompt)
    assert response["usage"]["completion_tokens"] == 32
