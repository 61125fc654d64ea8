"""Answer whole or with a stream, for as long as the client is there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ingine.errors import ClientError
from ingine.gateway.connection import EventStream, while_connected
from ingine.gateway.gateway import Gateway

T = TypeVar("T")


async def whole_answer(
    gateway: Gateway, request: Request, job_id: str, work: Coroutine[Any, Any, T], *, cancel: bool
) -> T:
    """Await `work`. Raises ClientDisconnect if the client leaves before. cancel: cancel the job then."""
    try:
        return await while_connected(request.receive, work)
    except ClientDisconnect:
        await _leave(gateway, job_id, cancel=cancel)
        raise


async def stream_response(
    gateway: Gateway,
    request: Request,
    job_id: str,
    parts: AsyncGenerator[bytes, None],
    *,
    cancel: bool,
) -> Response:
    """Begin a stream of `parts`. cancel: the job is cancelled if the client leaves before the end.

    Waits for the first part, but no longer than until a ping is due, so that a job which fails at once is
    answered by an error with a status. Raises what `parts` raises, and ClientDisconnect.
    """

    async def on_gone() -> None:
        await _leave(gateway, job_id, cancel=cancel)

    settings = gateway.settings
    first = asyncio.ensure_future(anext(parts, None))
    try:
        await while_connected(request.receive, _wait(first, settings.gateway_ping_s))
    except BaseException as error:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await parts.aclose()
        if isinstance(error, ClientDisconnect):
            await on_gone()
        raise
    if first.done():
        first.result()
    return EventStream(
        first,
        parts,
        ping_s=settings.gateway_ping_s,
        send_timeout_s=settings.gateway_send_timeout_s,
        on_gone=on_gone,
    )


async def _leave(gateway: Gateway, job_id: str, *, cancel: bool) -> None:
    if cancel:
        with suppress(ClientError):  # nobody is there to be told
            await gateway.client.cancel(job_id)


async def _wait(first: asyncio.Future, limit_s: float) -> None:
    await asyncio.wait({first}, timeout=limit_s)
