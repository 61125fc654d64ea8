"""Entries of a token log: as a consumer reads a page of it, and as a worker does that goes on from it."""

from random import Random
from types import SimpleNamespace

import msgpack

from benchmarks.fuzz import events
from benchmarks.fuzz.mutations import fields_case, text_bytes
from benchmarks.fuzz.running import finished, outcome
from ingine.errors import ClientError
from ingine.keys import Keys
from producer.token_log import UNREADABLE, LogPage, _page
from worker.queue import Queue

RECORD = {b"status": b"running", b"position": b"4", b"deadline_at": b"1700000000000"}


def cases(rng: Random) -> bytes:
    entries = [{b"event": events.cases(rng)} for _ in range(rng.randrange(3))]
    if entries and rng.random() < 0.2:
        entries[0] = {text_bytes(rng): events.cases(rng)}
    return msgpack.packb([entries, msgpack.unpackb(fields_case(rng, RECORD), strict_map_key=False)])


def check(case: bytes) -> str:
    entries, record = msgpack.unpackb(case, strict_map_key=False)
    entries = [(b"1-0", entry) for entry in entries]
    page = _page("a", entries, [record.get(name) for name in RECORD], 1_700_000_000_000)
    if isinstance(page, LogPage):
        for event in page.events:
            events.check_types(event)
        assert type(page.committed) is int and type(page.overdue) is bool
    else:
        assert isinstance(page, ClientError)
    committed, result = outcome(lambda: finished(_queue(entries).committed("a")), *UNREADABLE)
    assert result == "refused" or all(type(token_id) is int for token_id in committed)
    return f"{type(page).__name__}, {result} by a worker"


def _queue(entries: list) -> Queue:
    async def xrange(key: str) -> list:
        return entries

    queue = object.__new__(Queue)
    queue.keys, queue._redis = Keys("q"), SimpleNamespace(xrange=xrange)
    return queue
