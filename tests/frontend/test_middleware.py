"""The middleware over small ASGI applications: when the start of a stream is held, and how long."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from vllm_sparsed.frontend import installation
from vllm_sparsed.frontend.admission import tell_admitted, tell_refused
from vllm_sparsed.frontend.middleware import RequestMiddleware

Send = Callable[[dict[str, Any]], Awaitable[None]]
Script = Callable[[Send], Awaitable[None]]

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


def event(text: str, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


def ask(
    script: Script, path: str = "/v1/chat/completions", body: bytes = b"{}"
) -> list[dict[str, Any]]:
    """What a client gets from an application that answers by `script`."""
    got: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Send) -> None:
        assert (await receive())["body"] == body
        await script(send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": path}
    asyncio.run(RequestMiddleware(app)(scope, receive, send))  # type: ignore[arg-type]
    return got


def status(got: list[dict[str, Any]]) -> int:
    code: int = got[0]["status"]
    return code


def message(got: list[dict[str, Any]]) -> str:
    text: str = json.loads(got[1]["body"])["error"]["message"]
    return text


REFUSAL = VLLMValidationError("diffusion_steps is 0", parameter="diffusion_steps")
ERROR_EVENT = 'data: {"error": {"message": "bad", "type": "x", "param": null, "code": 422}}\n\n'


@pytest.mark.parametrize("path", ["/v1/responses", "/root/path/v1/messages"])
def test_a_refusal_takes_the_place_of_whatever_was_sent(path: str) -> None:
    async def script(send: Send) -> None:
        await send(START)
        await send(event("event: response.created\ndata: {}\n\n"))
        tell_refused(REFUSAL)
        await send(event('event: error\ndata: {"type":"error","error":{"message":"?"}}\n\n'))
        await send(event("", more=False))

    got = ask(script, path)
    assert (status(got), message(got)) == (400, "diffusion_steps is 0 (parameter=diffusion_steps)")


def test_an_error_as_the_first_event_has_its_own_status() -> None:
    async def script(send: Send) -> None:
        await send(START)
        await send(event(ERROR_EVENT))
        await send(event("data: [DONE]\n\n", more=False))

    got = ask(script)
    assert (status(got), message(got)) == (422, "bad")


def test_an_exception_before_the_checks_is_answered() -> None:
    async def script(send: Send) -> None:
        await send(START)
        try:
            raise REFUSAL
        except VLLMValidationError as error:
            # As Starlette does where the answer has begun.
            raise RuntimeError("response already started") from error

    assert status(ask(script)) == 400


def test_an_exception_in_the_middle_is_the_servers() -> None:
    async def script(send: Send) -> None:
        await send(START)
        await send(event("data: {}\n\n"))
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        ask(script)


def test_the_start_is_sent_once_the_request_is_admitted() -> None:
    """Long before the first event, and what was held keeps its order."""
    seen: list[int] = []
    got: list[dict[str, Any]] = []

    async def script(send: Send) -> None:
        await send(START)
        await send(event("event: response.created\ndata: {}\n\n"))
        seen.append(len(got))
        tell_admitted()
        for _ in range(50):
            await asyncio.sleep(0)
        seen.append(len(got))
        await send(event("data: first\n\n"))
        await send(event(ERROR_EVENT))
        await send(event("", more=False))

    async def app(scope: Any, receive: Any, send: Send) -> None:
        await script(send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        got.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/responses"}
    asyncio.run(RequestMiddleware(app)(scope, receive, send))  # type: ignore[arg-type]
    assert seen == [0, 2]
    assert [part.get("body", b"")[:11] for part in got[2:4]] == [b"data: first", b'data: {"err']


def test_of_several_prompts_one_refusal_is_enough() -> None:
    """Their checks run in tasks that start together; a good one must not let the start go."""

    async def script(send: Send) -> None:
        await send(START)

        async def check(error: Exception | None) -> None:
            await asyncio.sleep(0)
            if error is None:
                tell_admitted()
            else:
                tell_refused(error)

        await asyncio.gather(check(None), check(None), check(REFUSAL))
        for _ in range(50):
            await asyncio.sleep(0)
        await send(event(ERROR_EVENT, more=False))

    assert status(ask(script)) == 400


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/v1/chat/completions/render"])
def test_other_routes_pass(path: str) -> None:
    async def script(send: Send) -> None:
        await send(START)
        await send(event(ERROR_EVENT, more=False))

    assert status(ask(script, path, b'{"diffusion_steps": 8}')) == 200


def test_a_container_keeps_its_own_middleware(monkeypatch: pytest.MonkeyPatch) -> None:
    from model_hosting_container_standards.common.fastapi.middleware.source import decorator_loader

    warnings: list[str] = []
    monkeypatch.setattr(installation, "_installed", False)
    monkeypatch.setattr(decorator_loader, "pre_post_middleware", object())
    monkeypatch.setattr(
        installation.logger, "warning", lambda text, *args: warnings.append(text % args)
    )
    installation.install_middleware(0.0)
    assert len(warnings) == 1
    assert "could not be installed" in warnings[0]
    monkeypatch.setattr(decorator_loader, "pre_post_middleware", None)
    installation.install_middleware(0.0)
    installation.install_middleware(0.0)
    assert decorator_loader.pre_post_middleware is RequestMiddleware
    assert len(warnings) == 1
