"""The page with a server of the OpenAI API that shows no canvases, in a real browser."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from examples.canvas_page.serve import page_server
from tests.engine.browser import find_browser, running_browser

FOUND = find_browser()
PIECES = ["Light ", "is ", "scattered."]


class PlainServer(BaseHTTPRequestHandler):
    """Streams an answer; knows no canvases. Keeps what it was asked."""

    asked: list[dict[str, object]] = []  # noqa: RUF012

    def answer(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.end_headers()
        self.wfile.write(text.encode())

    def do_OPTIONS(self) -> None:
        self.answer(200, "text/plain", "")

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, "application/json", json.dumps({"data": [{"id": "plain"}]}))
        else:
            self.answer(404, "application/json", json.dumps({"detail": "Not Found"}))

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in PIECES]
        events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
        self.answer(200, "text/event-stream", f"{events}data: [DONE]\n\n")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.skipif(FOUND is None, reason="no Chromium with its chromedriver on this machine")
def test_the_answer_appears_without_canvases() -> None:
    assert FOUND is not None
    with (
        running(ThreadingHTTPServer(("127.0.0.1", 0), PlainServer)) as api,
        running(page_server("127.0.0.1", 0)) as page,
        running_browser(*FOUND) as browser,
    ):
        browser.open(f"{page}/?server={api}/v1/&question=Why%3F")
        browser.set("[data-panel=left] [data-more]", '{"diffusion_threshold": 0.9}')
        browser.click("#run")
        deadline = time.monotonic() + 60
        while browser.texts("[data-out=state]") != ["done", "done"]:
            assert time.monotonic() < deadline, browser.texts("[data-out]")
            time.sleep(0.05)
        assert browser.texts("[data-out=answer]") == ["".join(PIECES)] * 2
        assert browser.texts("[data-out=passes]") == ["-", "-"]
        assert browser.texts(".mask") == ["░"]  # the legend's
        assert "shows no canvases" in browser.texts("#note")[0]
    left, right = PlainServer.asked
    assert left["vllm_xargs"] == {"diffusion_threshold": 0.9}
    assert right["vllm_xargs"] == {"sparsed_enabled": 0}
    assert left["messages"] == [{"role": "user", "content": "Why?"}]


def test_nothing_but_the_page_is_served() -> None:
    with running(page_server("127.0.0.1", 0)) as page:
        found = httpx.get(f"{page}/?server=x")
        assert found.status_code == 200
        assert found.headers["content-type"].startswith("text/html")
        assert "An answer as it is decided" in found.text
        # One file: nothing of another host.
        assert "src=" not in found.text
        for path in ("/serve.py", "/../serve.py", "/README.md"):
            assert httpx.get(f"{page}{path}").status_code == 404
