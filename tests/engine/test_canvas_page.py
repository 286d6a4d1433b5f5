"""The canvas over HTTP, and the page that draws it, in a real browser."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from examples.canvas_page.serve import page_server
from tests.engine.browser import Browser, find_browser, running_browser
from tests.engine.http_server import MODEL_NAME, Server

FOUND = find_browser()
needs_browser = pytest.mark.skipif(
    FOUND is None, reason="no Chromium with its chromedriver on this machine"
)
MASK, SPECIAL = 383, (1, 2, 383)
LONG = 240
STEPS = 60
CANVAS = 60


def chat_body(name: str, **parameters: Any) -> dict[str, Any]:
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "w20 w21 w22"}],
        "max_tokens": CANVAS,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "request_id": name,
        "vllm_xargs": {"diffusion_steps": STEPS, "diffusion_block_length": CANVAS, **parameters},
    }


def canvases(server: Server, request_id: str) -> list[dict[str, Any]]:
    answer = server.get(f"/v1/canvases/{request_id}")
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == request_id
    choices: list[dict[str, Any]] = answer.json()["choices"]
    return choices


def last_canvas(server: Server, request_id: str) -> dict[str, Any]:
    """The canvas of a request that has ended; the worker hears of that in its next step."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = canvases(server, request_id)
        if found and found[0]["finished"]:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("the request does not end")


def shown_tokens(tokens: list[int]) -> list[int | None]:
    """A position that is decided to be the mask token stays one."""
    return [None if token == MASK else token for token in tokens]


def test_canvas_fills_in_while_the_request_runs(server: Server) -> None:
    # Long enough that a busy machine sees some of its passes.
    changes = {"diffusion_steps": LONG, "diffusion_block_length": LONG}
    body = chat_body("watched", diffusion_show_canvas=1, **changes) | {"max_tokens": LONG}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, "/v1/chat/completions", body)
        seen = []
        while not answer.done():
            seen += canvases(server, "chatcmpl-watched")
    choice = answer.result().json()["choices"][0]
    last = last_canvas(server, "chatcmpl-watched")
    assert last["tokens"] == shown_tokens(choice["token_ids"])
    assert last["texts"] == [
        token and ("·" if token in SPECIAL else f"w{token}") for token in last["tokens"]
    ]
    assert last["passes"] == last["most_passes"] == LONG
    # Passes 1 .. int(240 * 0.2) + 2 are dense.
    assert last["sparse_from"] == 51
    decided_in = [number for number in last["decided_in"] if number]
    assert len(set(decided_in)) == len(decided_in) == LONG - last["tokens"].count(None)
    partly = [canvas for canvas in seen if 0 < canvas["passes"] < LONG]
    assert len({canvas["passes"] for canvas in partly}) > 2
    for canvas in partly:
        # What was decided by then, and nothing else.
        assert canvas["tokens"] == [
            token if number <= canvas["passes"] else None
            for token, number in zip(last["tokens"], last["decided_in"], strict=True)
        ]
    # Decided behind a mask: what the stream of finished prefixes does not show.
    assert any(any(canvas["tokens"][canvas["tokens"].index(None) :]) for canvas in partly)


def test_watching_changes_no_token(server: Server) -> None:
    bodies = [chat_body("shown", diffusion_show_canvas=1), chat_body("hidden")]
    shown, hidden = (server.post("/v1/chat/completions", body).json() for body in bodies)
    assert shown["choices"][0]["token_ids"] == hidden["choices"][0]["token_ids"]
    assert shown.keys() == hidden.keys()
    assert canvases(server, "chatcmpl-hidden") == []
    assert canvases(server, "chatcmpl-unknown") == []


def test_each_choice_has_its_canvas(server: Server) -> None:
    body = chat_body("several", diffusion_show_canvas=1, diffusion_steps=2)
    choices = server.post(
        "/v1/chat/completions", {**body, "n": 2, "temperature": 1.0, "seed": 3}
    ).json()["choices"]
    last_canvas(server, "chatcmpl-several")
    found = canvases(server, "chatcmpl-several")
    assert [canvas["index"] for canvas in found] == [0, 1]
    tokens = [shown_tokens(choice["token_ids"]) for choice in choices]
    assert [canvas["tokens"] for canvas in found] == tokens
    assert found[0]["tokens"] != found[1]["tokens"]


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """Address of the page, served as the example serves it."""
    with page_server("127.0.0.1", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert FOUND is not None
    with running_browser(*FOUND) as running:
        yield running


def wait_for_states(browser: Browser, *wanted: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = browser.texts("[data-out=state]")
        if states == list(wanted):
            return
        time.sleep(0.05)
    raise AssertionError(f"{states} {browser.texts('[data-out=answer]')} {browser.log()}")


def values(browser: Browser, name: str) -> list[str]:
    return browser.texts(f"[data-out={name}]")


@needs_browser
def test_the_page_shows_two_settings(server: Server, page: str, browser: Browser) -> None:
    browser.open(f"{page}?server={server.url}&question=w20+w21+w22")
    browser.set("#tokens", str(CANVAS))
    for panel in ("left", "right"):
        browser.set(f"[data-panel={panel}] [data-set=diffusion_block_length]", str(CANVAS))
    browser.set("[data-panel=left] [data-more]", '{"sparsed_skip": 0.5}')
    browser.set("[data-panel=right] [data-set=diffusion_steps]", "20")
    browser.click("#full")
    # Every number of decided tokens that was drawn.
    browser.run(
        "window.drawn = []; new MutationObserver(() => window.drawn.push("
        "document.querySelectorAll('[data-panel=left] .decided').length)).observe("
        "document.querySelector('[data-panel=left] [data-out=canvas]'), {childList: true});"
    )
    browser.click("#run")
    wait_for_states(browser, "done", "done")

    drawn = browser.run("return window.drawn")
    assert len(set(drawn)) > 2, drawn
    assert drawn == sorted(drawn)
    assert drawn[-1] == CANVAS
    assert values(browser, "decided") == ["60 of 60", "60 of 60"]
    assert values(browser, "passes") == ["60 of 60", "20 of 20"]
    assert values(browser, "rate") == ["1.00", "3.00"]
    assert values(browser, "attention") == ["sparse since pass 33", "dense"]
    assert all(float(time.removesuffix(" s")) > 0 for time in values(browser, "time"))
    # Underlined: decided by sparse attention.
    assert len(browser.texts("[data-panel=left] .sparse")) == 60 - 32
    assert browser.texts("[data-panel=right] [data-out=canvas] .sparse") == []
    # The streamed answer is what the canvas holds.
    for panel in ("left", "right"):
        cells = browser.texts(f"[data-panel={panel}] .decided")
        (answer,) = browser.texts(f"[data-panel={panel}] .answer")
        assert answer.split() == [cell for cell in cells if cell != "·"]
    assert browser.log() == []


@needs_browser
def test_the_page_reports_errors(server: Server, page: str, browser: Browser) -> None:
    browser.open(f"{page}?server={server.url}&question=w20")
    browser.set("[data-panel=left] [data-more]", '{"diffusion_stepz": 3}')
    browser.set("[data-panel=right] [data-set=diffusion_steps]", "4")
    browser.click("#run")
    wait_for_states(browser, "failed", "done")
    left, _ = values(browser, "answer")
    assert "'diffusion_stepz' is not a parameter. Did you mean" in left
    browser.set("#server", "http://127.0.0.1:9")
    browser.click("#run")
    wait_for_states(browser, "failed", "failed")
    assert "--allowed-origins" in values(browser, "answer")[0]
    browser.log()
