"""A TCP proxy that misbehaves on command. All of a run's traffic goes through it, in its own process.

Run as `python -m tests.chaos.proxy`: commands are JSON lines on stdin, each answered by one on stdout; it
ends with its stdin. `ProxyProcess` is the harness's end. Faults hit a share of the connections that are open:

    cut         both ends are reset
    drop_reply  the next reply is swallowed, then both are reset: the server has executed the command
    delay       every chunk is late, for a while
    trickle     a few bytes at a time, for a while
    half_close  the client reads end of file, its own commands still go through
    stall       nothing passes either way, and neither end gets an error
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import sys

HOST = "127.0.0.1"
FAULTS = ("cut", "drop_reply", "delay", "trickle", "half_close", "stall")
TRICKLE_BYTES, TRICKLE_PAUSE_S = 24, 0.001
BUFFER_BYTES = 16 << 10
"""Small, so that a client that does not read blocks the server, as over a real network."""


class Link:
    """One client's connection, and the matching one to the server."""

    def __init__(self, client: tuple, server: tuple):
        self.client_reader, self.client_writer = client
        self.server_reader, self.server_writer = server
        self.dropping = self.stalled = self.deaf = False
        self.delay_s, self.delayed_until, self.trickle_until = 0.0, 0.0, 0.0

    def reset(self) -> None:
        for writer in (self.client_writer, self.server_writer):
            writer.transport.abort()

    def hit(self, kind: str, for_s: float) -> None:
        until = asyncio.get_running_loop().time() + for_s
        match kind:
            case "cut":
                self.reset()
            case "drop_reply":
                self.dropping = True
            case "delay":
                self.delayed_until, self.delay_s = until, for_s / 10
            case "trickle":
                self.trickle_until = until
            case "half_close":
                self.deaf = True
                with contextlib.suppress(OSError):
                    self.client_writer.write_eof()
            case "stall":
                self.stalled = True
            case _:
                raise ValueError(f"unknown fault {kind!r}")

    async def run(self) -> None:
        commands = asyncio.create_task(self._pump(self.client_reader, self.server_writer))
        replies = asyncio.create_task(self._pump(self.server_reader, self.client_writer, replies=True))
        await asyncio.wait({commands, replies}, return_when=asyncio.FIRST_COMPLETED)
        self.reset()
        for pump in (commands, replies):
            pump.cancel()
        await asyncio.wait({commands, replies})

    async def _pump(self, reader, writer, *, replies: bool = False) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while chunk := await reader.read(BUFFER_BYTES):
                if loop.time() < self.delayed_until:
                    await asyncio.sleep(self.delay_s)
                if self.stalled or (replies and self.deaf):
                    continue
                if writer.is_closing() or (replies and self.dropping):
                    return
                if loop.time() < self.trickle_until:
                    await self._trickle(chunk, writer)
                else:
                    writer.write(chunk)
                await writer.drain()

    async def _trickle(self, chunk: bytes, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while chunk and loop.time() < self.trickle_until and not writer.is_closing():
            writer.write(chunk[:TRICKLE_BYTES])
            chunk = chunk[TRICKLE_BYTES:]
            await asyncio.sleep(TRICKLE_PAUSE_S)
        writer.write(chunk)


class Front:
    """A port that forwards to one server, which can be changed."""

    def __init__(self, upstream: int, seed: str):
        self.upstream = upstream
        self.links: list[Link] = []
        self._random = random.Random(seed)

    async def listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, HOST, 0, limit=BUFFER_BYTES)
        return self._server.sockets[0].getsockname()[1]

    def hit(self, kind: str, share: float, for_s: float) -> int:
        """Apply a fault to a share of the open connections, at least one. Returns their number."""
        victims = self._random.sample(
            self.links, min(len(self.links), max(1, round(share * len(self.links))))
        )
        for link in victims:
            link.hit(kind, for_s)
        return len(victims)

    def point(self, upstream: int, *, cut: bool) -> None:
        """Send new connections to another server. Old ones are cut, or left open."""
        self.upstream = upstream
        for link in list(self.links) if cut else ():
            link.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection(HOST, self.upstream, limit=BUFFER_BYTES)
        except OSError:
            writer.transport.abort()
            return
        for end in (writer, upstream[1]):
            end.transport.set_write_buffer_limits(high=BUFFER_BYTES)
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link((reader, writer), upstream)
        self.links.append(link)
        try:
            await link.run()
        finally:
            self.links.remove(link)


async def serve(fronts: list[Front], lines: asyncio.StreamReader) -> None:
    while line := await lines.readline():
        match json.loads(line):
            case {"listen": upstream, "seed": seed}:
                fronts.append(Front(upstream, seed))
                answer = await fronts[-1].listen()
            case {"fault": kind, "front": number, "share": share, "for_s": for_s}:
                answer = fronts[number].hit(kind, share, for_s)
            case {"point": upstream, "front": number, "cut": cut}:
                answer = fronts[number].point(upstream, cut=cut)
        print(json.dumps(answer), flush=True)


async def main() -> None:
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await serve([], lines)
    os._exit(0)  # all connections are cut


class ProxyProcess:
    """The harness's handle on the proxy, which ends with this process, since its stdin does."""

    async def start(self) -> "ProxyProcess":
        pipe = asyncio.subprocess.PIPE
        command = (sys.executable, "-m", "tests.chaos.proxy")
        self._program = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, start_new_session=True
        )
        self._turn = asyncio.Lock()
        return self

    async def ask(self, **command):
        async with self._turn:
            self._program.stdin.write(json.dumps(command).encode() + b"\n")
            answer = await self._program.stdout.readline()
        if not answer:
            raise RuntimeError("the proxy has ended")
        return json.loads(answer)

    async def stop(self) -> None:
        self._program.stdin.close()
        await self._program.wait()


if __name__ == "__main__":
    asyncio.run(main())
