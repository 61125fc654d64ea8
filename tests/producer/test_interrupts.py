"""Ctrl-C while a blocking client is at work, at any moment: it ends the call in flight, and no more."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import FrameType
from typing import Any

import pytest

from ingine.contract.keys import Keys
from ingine.producer import Client
from ingine.producer.loop_thread import Call
from ingine.producer.sync import _iterate
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S


@contextmanager
def interrupt_at(number: int) -> Iterator[None]:
    """Raise KeyboardInterrupt at this thread's Python call or return of that number, from 0.

    The interpreter checks for signals there, and at each iteration of a loop.
    """
    so_far = count()

    def profile(_: FrameType, event: str, __: Any) -> None:
        if event != "c_call" and next(so_far) == number:
            raise KeyboardInterrupt  # this also ends the profiling

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.fixture
async def job_id(valkey: Server, queue: str) -> str:
    """A running job with one event in its log."""
    async with valkey.connect() as redis, valkey.client(queue) as client:
        worker = FakeWorker(redis, Keys(queue))
        await client.submit("hi", job_id="mine")
        await worker.take()
        await worker.commit("mine", 0, 2)
    return "mine"


@pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_an_interrupt_anywhere_in_a_stream_is_that_interrupt(valkey: Server, queue: str, job_id: str):
    """The interrupt is no error of the clean-up, and the thread does not wait for ever."""
    with Client(valkey.url, queue=queue) as client:
        first = client.attach(job_id).stream()
        next(first)  # fill caches, whose functions are not called again
        for number in count():
            stream, chunk = client.attach(job_id).stream(), None
            with suppress(KeyboardInterrupt), interrupt_at(number):
                chunk = next(stream)
            stream.close()
            if chunk:
                break
        assert number > 20
        assert chunk.text == "<1><2>"
        assert client.status(job_id).position == 2


def test_a_second_interrupt_does_not_wait_for_what_the_first_one_ends(
    valkey: Server, queue: str, monkeypatch
):
    wait, interrupts = Call.wait, []
    began, may_end = threading.Event(), threading.Event()

    async def slow_to_end() -> AsyncIterator[int]:
        try:
            began.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(may_end.wait)
        yield 0

    def interrupted_twice(call: Call) -> None:
        if len(interrupts) < 2:
            assert began.wait(HANGS_S)
            interrupts.append(call)
            raise KeyboardInterrupt
        wait(call)

    with Client(valkey.url, queue=queue) as client:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Call, "wait", interrupted_twice)
            next(_iterate(client, slow_to_end(), str))
        may_end.set()
        assert client.queue_info().num_delayed == 0
