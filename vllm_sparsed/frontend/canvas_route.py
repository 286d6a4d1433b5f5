"""The route `GET /v1/canvases/{request_id}`: the canvas of a request as it is decided.

vLLM streams the finished prefix of a canvas; what is decided behind the first mask is not in it.
This is an endpoint plugin of vLLM (`vllm.plugins.endpoint_plugins`), loaded only where the server's
VLLM_PLUGINS names it, and it answers for those requests alone that set `diffusion_show_canvas`.
"""

import asyncio
from argparse import Namespace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from fastapi import FastAPI, HTTPException

from vllm_sparsed.config.settings import server_settings
from vllm_sparsed.models.registry import MODELS
from vllm_sparsed.shown_canvas import ShownCanvas, token_texts

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

PATH: Final = "/v1/canvases/{request_id}"
NOT_SHOWN: Final = (
    "This server shows no canvases: it needs a diffusion language model and "
    """--additional-config '{"diffusion": {"show_canvas": true}}'."""
)


class CanvasRoute:
    """vLLM's endpoint plugin; asks the first worker through `collective_rpc`."""

    name = "sparsed"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._engine: EngineClient | None = None
        self._in_turn = asyncio.Lock()

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self.canvases, methods=["GET"])

    async def init_state(
        self, engine_client: "EngineClient | None", state: "State", args: Namespace
    ) -> None:
        """Keep the engine, if it is one whose requests may show their canvases."""
        if engine_client is None:
            return
        config = engine_client.vllm_config
        if (
            config.model_config.architecture in MODELS
            and server_settings(config).defaults.show_canvas
        ):
            self._engine = engine_client

    async def canvases(self, request_id: str) -> dict[str, Any]:
        """What is decided of a request's canvases by now.

        Args:
            request_id: `id` of the response, such as "chatcmpl-...".

        Returns:
            `choices`: the fields of `ShownCanvas` for each choice, with `texts` beside the tokens;
            empty while the request waits, without `diffusion_show_canvas`, and once it is
            forgotten.

        Raises:
            HTTPException: 404, this server shows no canvases.
        """
        if self._engine is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, NOT_SHOWN)
        # One question at a time: the engine answers between two steps, so however many watch, no
        # step waits for more than one answer.
        async with self._in_turn:
            answers = await self._engine.collective_rpc("shown_canvases", args=(request_id,))
        text = token_texts(self._engine.renderer.get_tokenizer())
        choices = []
        for fields in answers[0]:
            canvas = ShownCanvas(**fields)
            texts = [None if token is None else text(token) for token in canvas.tokens]
            choices.append({**canvas.to_fields(), "texts": texts})
        return {"id": request_id, "choices": choices}
