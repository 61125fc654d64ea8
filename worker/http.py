"""Serve /metrics, /healthz and /readyz on one port, from a thread that loop and engine cannot hold up.

Clients may be hostile: a connection has a few seconds and bytes for one request, the number of connections is
bounded, and metrics are collected at most once per second.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from ingine.errors import ConfigError
from ingine.worker.http_port import cannot_listen

Check = Callable[[], str | None]
"""Returns what is wrong, as a phrase, or None."""
Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type and body."""

MAX_CONNECTIONS = 64
"""A further connection closes the oldest one, which has had the most time to send its request."""
MAX_HEAD_BYTES = 16_384
TIMEOUT_S = 5.0
"""Limit for the arrival of the request, and again for the sending of the answer."""
METRICS_AGE_S = 1.0
TEXT = "text/plain; charset=utf-8"


class HttpServer:
    def __init__(self, host: str, port: int, registry: CollectorRegistry, *, healthy: Check, ready: Check):
        """Bind the port. Raises ConfigError if that is not possible."""
        self._registry = registry
        self._checks = {"/healthz": healthy, "/readyz": ready}
        self._metrics, self._metrics_at = b"", -METRICS_AGE_S
        self._connections: dict[asyncio.Task, asyncio.StreamWriter] = {}
        try:
            # A short queue: so many connections are accepted in one turn, and none of them closes another.
            self._socket = socket.create_server((host, port), backlog=MAX_CONNECTIONS // 2)
        except OSError as error:
            raise ConfigError(cannot_listen(host, port, error)) from None
        self.port: int = self._socket.getsockname()[1]
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        if self._loop is None:
            self._socket.close()
        elif self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._accept, sock=self._socket, limit=MAX_HEAD_BYTES, backlog=MAX_CONNECTIONS // 2
        )
        await self._stopped.wait()
        server.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            oldest = next(iter(self._connections))
            self._connections.pop(oldest).transport.abort()
        task = asyncio.ensure_future(self._handle(reader, writer))
        self._connections[task] = writer
        task.add_done_callback(lambda ended: self._connections.pop(ended, None))

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, and close the connection. A slow or closed connection is not logged."""
        try:
            with suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(TIMEOUT_S):
                    response = await self._respond(reader)
                async with asyncio.timeout(TIMEOUT_S):
                    writer.transport.set_write_buffer_limits(0)  # `drain` returns once all is sent
                    writer.write(response)
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _respond(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(_error(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE))
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if not version.startswith(b"HTTP/1."):
            return _response(_error(HTTPStatus.BAD_REQUEST))
        if method not in (b"GET", b"HEAD"):
            return _response(_error(HTTPStatus.METHOD_NOT_ALLOWED))
        path = target.partition(b"?")[0].decode("ascii", "replace")
        return _response(self._answer(path), with_body=method == b"GET")

    def _answer(self, path: str) -> Answer:
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, self._recent_metrics()
        if check := self._checks.get(path):
            fault = check()
            status = HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK
            return status, TEXT, f"{fault or 'ok'}\n".encode()
        return HTTPStatus.NOT_FOUND, TEXT, b"/metrics /healthz /readyz\n"

    def _recent_metrics(self) -> bytes:
        """The metrics, at most `METRICS_AGE_S` old: collecting them holds the interpreter, which the worker's
        loop needs too."""
        if (now := time.monotonic()) - self._metrics_at >= METRICS_AGE_S:
            self._metrics, self._metrics_at = generate_latest(self._registry), now
        return self._metrics


def _error(status: HTTPStatus) -> Answer:
    return status, TEXT, f"{status.phrase}\n".encode()


def _response(answer: Answer, *, with_body: bool = True) -> bytes:
    status, content_type, body = answer
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nAllow: GET, HEAD\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
