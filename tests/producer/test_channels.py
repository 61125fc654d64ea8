"""The hub that wakes streams: which messages are news, and how half-open connections end."""

import asyncio
from collections import Counter
from types import SimpleNamespace

import msgpack
import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

import ingine.producer.channels
from ingine.connect.pubsub import PubSubConnection
from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.producer.channels import (
    ANYWHERE,
    MAX_MESSAGE_BYTES,
    MESSAGES_AT_ONCE,
    ChannelHub,
    Subscription,
    place_of,
)
from tests.servers import HOST, free_port
from tests.waiting import wait_until_async
from tests.worker.test_control import Relay


def event(position: int, *, ends: bool = False) -> bytes:
    if ends:
        return encode_event(TerminalEvent(position, JobStatus.FINISHED, "a"))
    return encode_event(TokensEvent(position, [1], "x"))


def test_only_what_lies_behind_what_was_read_is_news():
    subscription = Subscription()
    assert subscription.has_news, "the log is read first"
    subscription.forget()
    subscription.push(place_of(event(5)))  # published while the log was read, and read with it
    subscription.has_read(5)
    assert not subscription.has_news
    for old in (event(4), event(5), event(4, ends=True)):
        subscription.push(place_of(old))
        assert not subscription.has_news
    for new in (event(6), event(5, ends=True), b"no event"):
        subscription.forget()
        subscription.has_read(5)
        subscription.push(place_of(new))
        assert subscription.has_news


def test_who_waits_for_the_end_is_woken_by_nothing_else():
    subscription = Subscription(ends_only=True)
    subscription.forget()
    subscription.push(place_of(event(7)))
    assert not subscription.has_news
    subscription.push(place_of(event(7, ends=True)))
    assert subscription.has_news


async def test_a_wait_ends_with_news_or_with_its_time():
    subscription, clock = Subscription(), asyncio.get_running_loop().time
    subscription.forget()
    subscription.has_read(5)
    await subscription.wait(until := clock() + 0.02)
    assert clock() >= until and not subscription.has_news
    soon = clock() + 0.02
    subscription._timer = asyncio.get_running_loop().call_at(
        soon, subscription._time_out
    )  # the timer of an earlier wait
    await subscription.wait(until := clock() + 0.05)
    assert clock() >= until
    waiting = asyncio.create_task(subscription.wait(clock() + 1000))
    await asyncio.sleep(0)
    subscription.push((6, False))
    await waiting
    assert subscription.has_news


@pytest.mark.parametrize(
    "message",
    [
        *(b"", b"\xc1", msgpack.packb(1), msgpack.packb({}), msgpack.packb({"type": "tokens"})),
        *(msgpack.packb({"type": "tokens", "position": odd}) for odd in ("1", 1.5, None, True, [1])),
        b"\x91" * 2000,
        bytes(MAX_MESSAGE_BYTES + 1),
    ],
    ids=lambda message: f"{message[:24].hex()}-{len(message)}",
)
def test_what_is_no_event_may_mean_anything(message: bytes):
    assert place_of(message) == ANYWHERE


async def test_a_connection_that_answers_no_ping_is_made_again(redis_url, queue, monkeypatch):
    monkeypatch.setattr(ingine.producer.channels, "PING_S", 0.2)
    relay, port, channel = Relay(redis_url), free_port(), Keys(queue).channel("a")
    await relay.serve(port)
    async with Redis.from_url(f"redis://{HOST}:{port}") as behind, Redis.from_url(redis_url) as direct:
        hub = ChannelHub(behind)
        subscription = hub.subscribe(channel)

        async def hears(position: int) -> None:
            async def told() -> bool:
                if subscription.heard == ANYWHERE:  # as after each confirmation
                    subscription.forget()
                await direct.spublish(channel, event(position))
                await asyncio.sleep(0)
                return subscription.heard == (position, False)

            await wait_until_async(told, what="an event")

        await hears(1)
        relay.cut()
        await hears(2)
        await hub.aclose()
    relay.cut()
    relay._server.close()


class Scripted:
    """A connection with prepared answers, of which None is silence. It ends after the last."""

    is_connected = True

    def __init__(self, *answers):
        self._answers, self.sent = list(answers), []

    async def send_command(self, *command, **_) -> None:
        self.sent.append(command[0])

    async def read_response(self, **_):
        if not self._answers:
            raise ConnectionError("the end")
        return self._answers.pop(0)


def over(connection) -> PubSubConnection:
    pool = SimpleNamespace(make_connection=lambda: connection)
    return PubSubConnection(SimpleNamespace(connection_pool=pool), ping_s=1.0)


async def test_a_silence_that_ends_with_an_answer_breaks_no_connection():
    pong = [b"pong", b""]
    connection = Scripted(None, pong, None, pong, None)
    with pytest.raises(ConnectionError, match="the end"):
        await ChannelHub(Redis())._read(over(connection), Counter())
    assert connection.sent == ["PING"] * 3


async def test_however_many_messages_there_are_streams_get_their_turn():
    """Each message has already arrived, as under a flood, or in a process that lacks processor time."""
    num_messages, turns = 50 * MESSAGES_AT_ONCE, 0
    connection = Scripted(*[[b"smessage", b"channel", event(1)]] * num_messages)

    async def stream() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    streaming = asyncio.create_task(stream())
    with pytest.raises(ConnectionError, match="the end"):
        await ChannelHub(Redis())._read(over(connection), Counter())
    streaming.cancel()
    assert turns >= 49
