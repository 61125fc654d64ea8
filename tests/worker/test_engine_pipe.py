"""The pipe between a worker and its engine's process, without an engine: what comes through it is whole."""

import asyncio
import logging
import socket
import threading

from ingine.worker.hosting.engine_child import _Server
from ingine.worker.hosting.pipe import Pipe, make_unpacker, pack
from tests.waiting import HANGS_S, wait_until_async

NUM_MESSAGES, PAYLOAD = 8, b"x" * (256 << 10)
"""More than any buffer of a socket holds, so that each message is sent in many parts."""


async def test_messages_come_one_by_one_however_the_bytes_come():
    ours, theirs = socket.socketpair()
    received = []
    pipe = await Pipe.open(ours, received.append, lambda: None)
    third = pack("third", list(range(99)))
    with theirs:
        theirs.sendall(pack("first", 1) + pack("second") + third[:50])
        await wait_until_async(lambda: received, what="what came together")
        assert received == [["first", 1], ["second"]]
        theirs.sendall(third[50:])
        await wait_until_async(lambda: len(received) == 3, what="what came in two parts")
        assert received[2] == ["third", list(range(99))]
    pipe.close()


async def test_what_is_sent_to_nobody_is_dropped_without_a_word(caplog):
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    pipe = await Pipe.open(ours, lambda message: None, lost.set)
    theirs.close()
    await lost.wait()
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            pipe.send("credit")
    assert not caplog.records


def test_what_two_threads_send_at_once_comes_whole():
    """The engine's thread its outputs, and the main one its pulse."""
    ours, theirs = socket.socketpair()
    server = _Server(ours)

    def send(name: str) -> None:
        for number in range(NUM_MESSAGES):
            server._send(name, number, PAYLOAD)

    names = ("outputs", "pulse")
    threads = [threading.Thread(target=send, args=(name,), daemon=True) for name in names]
    expected = [[name, number, PAYLOAD] for name in names for number in range(NUM_MESSAGES)]
    unpacker, num_bytes_left = make_unpacker(), sum(len(pack(*message)) for message in expected)
    theirs.settimeout(HANGS_S)
    with ours, theirs:
        for thread in threads:
            thread.start()
        while num_bytes_left:
            received = theirs.recv(1 << 14)
            num_bytes_left -= len(received)
            unpacker.feed(received)
        for thread in threads:
            thread.join()
    assert sorted(unpacker) == expected
