"""Writing a stream: slow readers, pings, a client that leaves, and errors, without a network."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from ingine.errors import JobFailed
from ingine.gateway.connection import EventStream, while_connected
from tests.waiting import HANGS_S, wait_until_async


class Connection:
    """The client's end: what was sent to it, whether it reads, and whether it is still there."""

    def __init__(self):
        self.messages: list[dict] = []
        self.reads, self.left = asyncio.Event(), asyncio.Event()
        self.reads.set()

    async def send(self, message: dict) -> None:
        await self.reads.wait()
        self.messages.append(message)

    async def receive(self) -> dict:
        await self.left.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_complete(self) -> bool:
        return not self.messages[-1].get("more_body", True)


class Stream:
    """An EventStream of parts that a test puts into a queue; None ends it, an error is raised."""

    def __init__(self, *, ping_s: float = HANGS_S, send_timeout_s: float = HANGS_S):
        self.queue, self.num_taken, self.is_closed, self.num_left = asyncio.Queue(), 0, False, 0
        parts = self._parts()
        first = asyncio.ensure_future(anext(parts, None))
        self.response = EventStream(
            first, parts, ping_s=ping_s, send_timeout_s=send_timeout_s, on_gone=self._on_gone
        )

    async def _parts(self):
        try:
            while (part := await self.queue.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                self.num_taken += 1
                yield part
        finally:
            self.is_closed = True

    async def _on_gone(self) -> None:
        self.num_left += 1

    def put(self, *parts) -> None:
        for part in parts:
            self.queue.put_nowait(part)


@pytest.fixture
async def connection() -> Connection:
    return Connection()


async def test_a_whole_stream(connection):
    stream = Stream()
    stream.put(b"one", b"two", None)
    await stream.response({}, connection.receive, connection.send)
    assert connection.body == b"onetwo" and connection.is_complete
    headers = dict(connection.messages[0]["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert stream.is_closed and stream.num_left == 0


async def test_nothing_is_read_ahead_for_a_slow_client(connection):
    stream = Stream()
    stream.put(*[b"part"] * 100, None)
    connection.reads.clear()
    serving = asyncio.ensure_future(stream.response({}, connection.receive, connection.send))
    await wait_until_async(lambda: stream.num_taken)
    for _ in range(100):
        await asyncio.sleep(0)
    assert stream.num_taken == 1
    connection.reads.set()
    await serving
    assert connection.body == b"part" * 100


async def test_a_client_that_reads_nothing_more_is_given_up(connection):
    stream = Stream(send_timeout_s=0.05)
    stream.put(b"one")
    serving = asyncio.ensure_future(stream.response({}, connection.receive, connection.send))
    await wait_until_async(lambda: connection.body)
    connection.reads.clear()
    stream.put(b"two")
    await serving
    assert stream.is_closed and stream.num_left == 1


async def test_a_client_that_leaves(connection):
    stream = Stream()
    stream.put(b"one")
    serving = asyncio.ensure_future(stream.response({}, connection.receive, connection.send))
    await wait_until_async(lambda: connection.body)
    connection.left.set()
    await serving
    assert stream.is_closed and stream.num_left == 1 and not connection.is_complete


async def test_a_gateway_that_shuts_down_does_not_cancel_the_job(connection):
    stream = Stream()
    stream.put(b"one")
    serving = asyncio.ensure_future(stream.response({}, connection.receive, connection.send))
    await wait_until_async(lambda: connection.body)
    serving.cancel()
    await serving
    assert stream.is_closed and stream.num_left == 0 and not connection.is_complete


@pytest.mark.parametrize(
    ("error", "code"),
    [(JobFailed("m", code="engine_error"), "engine_error"), (KeyError("k"), "internal_error")],
)
async def test_an_error_is_told_and_the_stream_cut_off(connection, error, code):
    stream = Stream()
    stream.put(b"one", error)
    await stream.response({}, connection.receive, connection.send)
    assert (
        connection.body.startswith(b'onedata: {"error":{') and f'"code":"{code}"'.encode() in connection.body
    )
    assert not connection.is_complete and stream.num_left == 0


async def test_pings_while_nothing_comes(connection):
    stream = Stream(ping_s=0.01)
    serving = asyncio.ensure_future(stream.response({}, connection.receive, connection.send))
    await wait_until_async(lambda: connection.body.count(b": ping\n") >= 3)
    stream.put(b"one", None)
    await serving
    assert connection.body.startswith(b": ping\n" * 3) and b"one" in connection.body


async def test_work_goes_on_until_the_client_leaves(connection):
    never = asyncio.Event()

    async def work():
        try:
            await never.wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    ended = []
    waiting = asyncio.ensure_future(while_connected(connection.receive, work()))
    await asyncio.sleep(0)
    connection.left.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert ended == [True]
    assert await while_connected(Connection().receive, asyncio.sleep(0, "done")) == "done"
