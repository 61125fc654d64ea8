"""`/v1/models`: the models that workers serve now, from their heartbeats."""

import asyncio
import math
import time
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ingine.contract.keys import SILENT_AFTER_S
from ingine.errors import ClientError, NoWorker
from ingine.gateway.encoding import Json
from ingine.gateway.errors import Refused
from ingine.producer.client import AsyncClient
from ingine.producer.results import is_serving

FRESH_S = 1.0
"""How long what was read of the workers is used. A worker beats each second."""


class Workers:
    """The workers of the queue, read at most once in FRESH_S for all requests."""

    def __init__(self, client: AsyncClient):
        self._client = client
        self._models: dict[str, int] = {}
        self._read_at = -math.inf
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task | None = None

    async def models(self) -> dict[str, int]:
        """Return the name of each model that a worker serves -> when the gateway first saw it, in Unix time.

        Raises ServerUnavailable.
        """
        async with self._lock:
            if self._age_s >= FRESH_S:
                workers = (await self._client.queue_info()).workers.values()
                names = {str(beat["model"]) for beat in workers if is_serving(beat) and beat.get("model")}
                now_s = int(time.time())
                self._models = {name: self._models.get(name, now_s) for name in sorted(names)}
                self._read_at = time.monotonic()
            return self._models

    async def require(self) -> None:
        """Raise NoWorker if no worker serves the queue.

        Does not wait for the server if some worker served it lately: it is read beside the request then.
        """
        if self._models and self._age_s < SILENT_AFTER_S:
            if self._age_s >= FRESH_S and (self._refreshing is None or self._refreshing.done()):
                self._refreshing = asyncio.create_task(self._refresh())
            return
        if not await self.models():
            raise NoWorker("no worker serves this queue at the moment, nothing was accepted: try again later")

    async def _refresh(self) -> None:
        with suppress(ClientError):  # the request itself will say what is wrong
            await self.models()

    async def aclose(self) -> None:
        if self._refreshing is not None:
            await self._refreshing

    @property
    def _age_s(self) -> float:
        return time.monotonic() - self._read_at


def model_of(body: dict[str, Any]) -> str:
    """Return the model that a request asks for. Raises Refused if it names none."""
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise Refused(400, "missing_parameter", "name a model: /v1/models lists them", param="model")
    return model


async def list_models(request: Request) -> Response:
    return Json({"object": "list", "data": await _visible(request)})


async def get_model(request: Request) -> Response:
    name = request.path_params["model"]
    for model in await _visible(request):
        if model["id"] == name:
            return Json(model)
    raise Refused(404, "model_not_found", f"no worker serves a model {name!r}", param="model")


async def _visible(request: Request) -> list[dict[str, Any]]:
    """Return the models that the caller may use."""
    gateway = request.state.gateway
    caller = gateway.access.caller(request)
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "ingine"}
        for name, created in (await gateway.workers.models()).items()
        if caller.key is None or caller.key.allows(name)
    ]
