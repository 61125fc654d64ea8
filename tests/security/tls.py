"""TLS in front of a real server. The tests' binary is built without TLS, so Python terminates it."""

import asyncio
import ssl
import threading
from contextlib import closing, suppress
from typing import Self

import trustme

from tests.waiting import HANGS_S


class TlsFront:
    """Accepts TLS connections and forwards them to `port` of this machine. seen: the bytes on the wire.

    The certificate is for 127.0.0.1 unless `host` says otherwise, and signed by `authority`.
    """

    def __init__(self, authority: trustme.CA, port: int, *, host: str = "127.0.0.1"):
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(host).configure_cert(self._context)
        self._upstream = port
        self.seen = bytearray()

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls")
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(HANGS_S)
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(HANGS_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        self._inner = await asyncio.start_server(self._pass_on, "127.0.0.1", 0, ssl=self._context)
        self._outer = await asyncio.start_server(self._record, "127.0.0.1", 0)
        self.port = self._outer.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._outer.close()
        self._inner.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for running in rest:
            running.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _record(self, reader, writer) -> None:
        """Record the encrypted bytes, as an eavesdropper sees them, and forward them."""
        await _relay(reader, writer, self._inner.sockets[0].getsockname()[1], self.seen)

    async def _pass_on(self, reader, writer) -> None:
        await _relay(reader, writer, self._upstream, bytearray())


async def _relay(reader, writer, port: int, seen: bytearray) -> None:
    up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)

    async def copy(source, sink) -> None:
        # Either end may close, as a client does that refuses our certificate: then the other is closed too.
        with suppress(OSError, ssl.SSLError), closing(sink):
            while chunk := await source.read(1 << 16):
                seen.extend(chunk)
                sink.write(chunk)
                await sink.drain()

    await asyncio.gather(copy(reader, up_writer), copy(up_reader, writer))
