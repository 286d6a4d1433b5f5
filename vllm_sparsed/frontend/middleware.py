"""ASGI middleware of the API server: errors keep their status when a request is streamed.

vLLM checks the parameters of a streamed request only after the answer has begun with status 200, so
an error arrives as an event of the stream, or cuts the connection. Here the start of an event
stream is held back until the request is admitted, which takes no longer than its checks; a request
that is refused instead is answered as it would be without streaming.

Parameters of this package beside `vllm_xargs` instead of in it, which vLLM ignores, are refused.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from starlette.responses import JSONResponse
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMValidationError

from vllm_sparsed.config.parameter_table import PARAMETERS, shown
from vllm_sparsed.frontend.admission import LISTENER

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MESSAGES: Final = "/v1/messages"
ROUTES: Final = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    MESSAGES,
    "/invocations",
)
"""The routes that take `vllm_xargs`; a server may have them below a root path."""

_KEYS: Final = frozenset(parameter.request_key for parameter in PARAMETERS)

# Turns of the event loop from the check of one prompt's parameters until that of every prompt of
# the same body has been reported: their tasks start in the same turn.
_TURNS: Final = 8

# Events of /v1/responses that vLLM sends before it checks anything.
_BEFORE_CHECKS: Final = (b"event: response.created", b"event: response.in_progress")


class RequestMiddleware:
    """Pure ASGI, so that streams pass unbuffered and disconnections reach vLLM."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or scope["method"] != "POST" or not path.endswith(ROUTES):
            await self.app(scope, receive, send)
            return
        body, messages = await _read_body(receive)
        is_messages = path.endswith(MESSAGES)
        error = _misplaced_parameter(body)
        if error is not None:
            await _error_answer(error, is_messages)(scope, receive, send)
            return

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        answer = _HeldAnswer(send, is_messages)
        token = LISTENER.set(answer)
        try:
            await self.app(scope, replay, answer.send)
        except Exception as raised:
            # Once the answer has begun, the exception is the server's to deal with.
            if not answer.is_held:
                raise
            answer.refused(_cause(raised))
        finally:
            LISTENER.reset(token)
        await answer.finish(scope, receive)


async def _read_body(receive: Receive) -> tuple[bytes, list[Message]]:
    """The whole body, and the messages that it came in."""
    messages = [await receive()]
    while messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False):
        messages.append(await receive())
    return b"".join(message.get("body", b"") for message in messages), messages


def _misplaced_parameter(body: bytes) -> VLLMValidationError | None:
    """The error of a body with one of our parameters at its top level."""
    if b'"diffusion_' not in body and b'"sparsed_' not in body:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        # Not for us to say what is wrong with it.
        return None
    if not isinstance(fields, dict):
        return None
    for key, value in fields.items():
        if key in _KEYS:
            return VLLMValidationError(
                f'{key} must be inside vllm_xargs: {{"vllm_xargs": {{"{key}": {shown(value)}}}}}. '
                "At the top level of the body vLLM ignores it.",
                parameter=key,
                value=shown(value),
            )
    return None


class _HeldAnswer:
    """An answer on its way to the client; the start of an event stream waits in it.

    Attributes:
        is_held: whether an event stream has begun of which the client has seen nothing.
    """

    def __init__(self, send: Send, is_messages: bool) -> None:
        self.is_held = False
        self._send = send
        self._is_messages = is_messages
        self._held: list[Message] = []
        self._is_open = False
        self._is_admitted = False
        self._refusal: Exception | ErrorResponse | None = None
        # The application and the release of what is held both send.
        self._lock = asyncio.Lock()
        self._release: asyncio.Task[None] | None = None

    def admitted(self) -> None:
        if not self._is_admitted:
            self._is_admitted = True
            asyncio.get_running_loop().call_soon(self._turn, _TURNS)

    def _turn(self, left: int) -> None:
        loop = asyncio.get_running_loop()
        if left:
            loop.call_soon(self._turn, left - 1)
        elif self._refusal is None:
            self._release = loop.create_task(self._flush())

    def refused(self, error: Exception) -> None:
        if self._refusal is None and not self._is_open:
            self._refusal = error

    async def send(self, message: Message) -> None:
        """What the application sends."""
        async with self._lock:
            if self._is_open:
                await self._send(message)
                return
            if message["type"] == "http.response.start":
                if not _is_event_stream(message):
                    self._is_open = True
                    await self._send(message)
                    return
                self.is_held = True
            self._held.append(message)
            body = message.get("body", b"")
            if not body or self._refusal is not None:
                return
            self._refusal = _error_event(body)
            if self._refusal is None and not body.startswith(_BEFORE_CHECKS):
                await self._open()

    async def _flush(self) -> None:
        async with self._lock:
            if not self._is_open and self._refusal is None:
                await self._open()

    async def _open(self) -> None:
        self._is_open, self.is_held = True, False
        for message in self._held:
            await self._send(message)
        self._held.clear()

    async def finish(self, scope: MutableMapping[str, Any], receive: Receive) -> None:
        """The application has ended: send what is still held, or the refusal in its place."""
        if self._release is not None:
            await self._release
        async with self._lock:
            if self._is_open:
                return
            if self._refusal is None or not self.is_held:
                await self._open()
                return
            self._is_open, self.is_held = True, False
            answer = _error_answer(self._refusal, self._is_messages)
            await answer(scope, receive, self._send)


def _is_event_stream(start: Message) -> bool:
    return start["status"] == 200 and any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in start.get("headers", ())
    )


def _error_event(event: bytes) -> ErrorResponse | Exception | None:
    """The error that the first event of a stream consists of, if it does."""
    _, found, data = event.partition(b"data: ")
    # Not every event is parsed: this is what vLLM's errors begin with.
    if not found or not data.startswith((b'{"error"', b'{"type":"error"')):
        return None
    try:
        fields = json.loads(data.split(b"\n", 1)[0])
        if fields.get("type") != "error":
            return ErrorResponse.model_validate(fields)
        # /v1/messages turns every error of the stream that it converts into this one.
        return ValueError(fields["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None


def _cause(error: BaseException) -> Exception:
    """What went wrong, below what Starlette says of an answer that had begun."""
    while True:
        if isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        elif isinstance(error, RuntimeError) and error.__cause__ is not None:
            error = error.__cause__
        else:
            return error if isinstance(error, Exception) else RuntimeError(str(error))


def _error_answer(error: Exception | ErrorResponse, is_messages: bool) -> JSONResponse:
    """As vLLM answers without streaming."""
    body = error if isinstance(error, ErrorResponse) else create_error_response(error)
    if not is_messages:
        return JSONResponse(body.model_dump(), status_code=body.error.code)
    content = {"type": "error", "error": {"type": body.error.type, "message": body.error.message}}
    return JSONResponse(content, status_code=body.error.code)
