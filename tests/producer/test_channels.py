"""The hub of live events: what it keeps for a slow consumer, and what it does with a half-open connection."""

import asyncio
from collections import Counter

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

import producer.channels
from ingine.keys import Keys
from producer.channels import MAX_UNREAD_EVENTS, ChannelHub, Subscription
from tests.servers import HOST, free_port
from tests.waiting import wait_until_async
from tests.worker.test_control import Relay


def test_a_slow_consumer_keeps_no_more_than_a_bounded_number_of_events():
    subscription = Subscription()
    subscription.stale = False  # it has read the log
    for number in range(MAX_UNREAD_EVENTS):
        subscription.push(b"%d" % number)
    assert not subscription.stale and len(subscription.events) == MAX_UNREAD_EVENTS
    for _ in range(3):
        subscription.push(b"one too many")
        assert subscription.stale and not subscription.events, "it goes on from the log"


async def test_nothing_is_kept_for_a_consumer_that_has_to_read_the_log_first():
    subscription = Subscription()
    subscription.push(b"x")
    assert subscription.stale and not subscription.events
    await subscription.wait(60)  # it was woken all the same


async def test_a_connection_that_answers_no_ping_is_made_again(redis_url, queue, monkeypatch):
    monkeypatch.setattr(producer.channels, "PING_S", 0.2)
    relay, port, channel = Relay(redis_url), free_port(), Keys(queue).channel("a")
    await relay.serve(port)
    async with Redis.from_url(f"redis://{HOST}:{port}") as behind, Redis.from_url(redis_url) as direct:
        hub = ChannelHub(behind)
        subscription = hub.subscribe(channel)

        async def hears(event: bytes) -> None:
            async def told() -> bool:
                subscription.stale = False
                await direct.spublish(channel, event)
                await asyncio.sleep(0)
                return event in subscription.events

            await wait_until_async(told, what="an event")

        await hears(b"before")
        relay.cut()
        await hears(b"after")
        await hub.aclose()
    relay.cut()
    relay._server.close()


class Scripted:
    """A connection whose answers are known, None being a silence. After the last it ends."""

    is_connected = True

    def __init__(self, *answers):
        self._answers, self.sent = list(answers), []

    async def send_command(self, *command, **_) -> None:
        self.sent.append(command[0])

    async def read_response(self, **_):
        if not self._answers:
            raise ConnectionError("the end")
        return self._answers.pop(0)


async def test_a_silence_that_ends_with_an_answer_breaks_no_connection():
    pong = [b"pong", b""]
    connection = Scripted(None, pong, None, pong, None)
    with pytest.raises(ConnectionError, match="the end"):
        await ChannelHub(Redis())._read(connection, Counter())
    assert connection.sent == ["PING"] * 3
