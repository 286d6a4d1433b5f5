"""A headless Chromium, driven through chromedriver by the WebDriver protocol (W3C)."""

import base64
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.engine.http_server import free_port

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1200,900",
]


def find_browser() -> tuple[str, str] | None:
    """Paths of a browser and of its driver; None where one of them is not installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    # GitHub's runners name the folder of theirs.
    folders = os.pathsep.join(filter(None, [os.environ.get("CHROMEWEBDRIVER"), os.environ["PATH"]]))
    driver = shutil.which("chromedriver", path=folders)
    return (browser, driver) if browser and driver else None


class Browser:
    """One window. What the driver refuses raises `httpx.HTTPStatusError`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        answer = httpx.request(method, f"{self._url}{path}", json=body, timeout=60)
        answer.raise_for_status()
        return answer.json()["value"]

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value that a script returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def set(self, selector: str, value: str) -> None:
        """Fill in a field, as a user would."""
        self.run(
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));",
            selector,
            value,
        )

    def click(self, selector: str) -> None:
        (found,) = self._call("POST", "/elements", {"using": "css selector", "value": selector})
        (element,) = found.values()
        self._call("POST", f"/element/{element}/click", {})

    def texts(self, selector: str) -> list[str]:
        """Text of every element that a selector finds."""
        script = "return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)"
        texts: list[str] = self.run(script, selector)
        return texts

    def log(self) -> list[str]:
        """Errors and warnings on the browser's console since the last call."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))


@contextlib.contextmanager
def running_browser(browser: str, driver: str) -> Iterator[Browser]:
    """Run a browser with a profile of its own until the block ends."""
    port = free_port()
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = {"binary": browser, "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "WARNING"},
            }
            answer = httpx.post(
                f"{url}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=120
            )
            assert answer.status_code == 200, answer.text
            session = f"{url}/session/{answer.json()['value']['sessionId']}"
            try:
                yield Browser(session)
            finally:
                httpx.delete(session, timeout=60)
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/status", timeout=5).json()["value"]["ready"]:
                return
        time.sleep(0.1)
    raise RuntimeError("chromedriver did not start")
