"""The client's end of a connection: noticing that it is gone, and writing a stream to it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect

from ingine.errors import IngineError
from ingine.gateway import sse
from ingine.gateway.errors import fault_of, internal_error

logger = logging.getLogger("gateway")

T = TypeVar("T")
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. Raises ClientDisconnect, with `work` cancelled, once the client is gone.

    The body of the request must have been read.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        await _end(working, gone)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Future) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream:
    """A response of server-sent events, as an ASGI application.

    A part is asked for only when the one before it has been taken by the socket, so a slow client holds one
    part and its socket's buffer. After an error the stream is cut off, without the end that a complete
    response has: not every client reads an error event, and none shall take the rest for complete.
    """

    def __init__(
        self,
        first: "asyncio.Future[bytes | None]",
        parts: AsyncGenerator[bytes, None],
        *,
        ping_s: float,
        send_timeout_s: float,
        on_gone: Callable[[], Awaitable[None]],
    ):
        """first: `anext(parts, None)`, which may be under way. on_gone: called if the client leaves before
        the end."""
        self._first, self._parts = first, parts
        self._ping_s, self._send_timeout_s = ping_s, send_timeout_s
        self._on_gone = on_gone
        self._clock = asyncio.get_running_loop().time
        self._sent_at = self._clock()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in sse.HEADERS.items()]
        writing = asyncio.ensure_future(self._write(send, headers))
        pinging = asyncio.ensure_future(self._ping(send))
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            is_gone = not writing.done() or not writing.result()
        except asyncio.CancelledError:
            return  # the gateway shuts down: the job goes on, for a client that resumes the stream elsewhere
        finally:
            await _end(writing, pinging, gone)
        if is_gone:
            await self._on_gone()

    async def _write(self, send: Send, headers: list[tuple[bytes, bytes]]) -> bool:
        """Write all parts. Returns False if the client takes nothing more."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            part = await self._first
            while part is not None:
                async with asyncio.timeout(self._send_timeout_s):
                    await self._send(send, part)
                part = await anext(self._parts, None)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            return False
        except IngineError as error:
            await self._send(send, sse.event(fault_of(error).body()))
        except Exception:
            logger.exception("a stream failed")
            await self._send(send, sse.event(internal_error().body()))
        finally:
            with suppress(IngineError):
                await self._parts.aclose()
        return True

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(self._sent_at + self._ping_s - self._clock())
            if self._clock() >= self._sent_at + self._ping_s:
                await self._send(send, sse.PING)

    async def _send(self, send: Send, part: bytes) -> None:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        self._sent_at = self._clock()
