"""Fuzz entries of a token log: a consumer reads a page of it, and a worker resumes from it."""

from random import Random
from types import SimpleNamespace

import msgpack

from benchmarks.fuzz import events
from benchmarks.fuzz.mutations import fields_case, packed_case, text_bytes
from benchmarks.fuzz.running import finished, outcome
from ingine.contract.events import UNREADABLE, TerminalEvent
from ingine.contract.keys import Keys
from ingine.errors import ClientError
from ingine.producer.token_log import LogPage, _page
from ingine.worker.queue import Queue

RECORD = {b"status": b"running", b"position": b"4", b"deadline_at": b"1700000000000"}
TOKENS, END = events.VALID[0], events.VALID[2]
LOG = (
    (b"2-0", events.VALID[1]),
    (b"4-0", TOKENS),
    (b"4-1", END | {"position": 4}),
)
NOW_MS = 1_700_000_000_000
LONGEST_MESSAGE = 500


def cases(rng: Random) -> bytes:
    entries = []
    for entry_id, event in LOG[rng.choice((0, 0, 0, 1)) : rng.choice((1, 2, 3, 3, 3))]:
        raw = packed_case(rng, event) if rng.random() < 0.3 else msgpack.packb(event)
        field = text_bytes(rng) if rng.random() < 0.03 else b"event"
        odd = rng.choice((b"0-0", b"3-0", b"4-0", b"4-1", b"18446744073709551615-0"))
        entries.append((odd if rng.random() < 0.05 else entry_id, {field: raw}))
    if rng.random() < 0.1:
        rng.shuffle(entries)
    record = msgpack.unpackb(fields_case(rng, RECORD), strict_map_key=False)
    return msgpack.packb([rng.choice((0, 0, 0, 1, 2, 4, 2**63)), entries, record])


def check(case: bytes) -> str:
    position, entries, record = msgpack.unpackb(case, strict_map_key=False)
    request = SimpleNamespace(job_id="a", position=position)
    page = _page(request, entries, [record.get(name) for name in RECORD], NOW_MS)
    if isinstance(page, LogPage):
        check_page(page, position)
    else:
        assert isinstance(page, ClientError) and len(str(page)) <= LONGEST_MESSAGE
    committed, result = outcome(lambda: finished(_queue(entries).committed("a")), *UNREADABLE, ClientError)
    assert result == "refused" or all(type(token_id) is int and token_id >= 0 for token_id in committed)
    return f"{type(page).__name__}, {result} by a worker"


def check_page(page: LogPage, position: int) -> None:
    """Assert that each token comes once, and in order."""
    assert type(page.committed) is int and type(page.overdue) is bool
    for number, event in enumerate(page.events):
        events.check_types(event)
        assert event.start == position or (number == 0 and event.start < position)
        is_end = isinstance(event, TerminalEvent)
        assert not is_end or (event is page.events[-1] and event.job_id == "a")
        position = event.position


def _queue(entries: list) -> Queue:
    async def xrange(key: str) -> list:
        return entries

    queue = object.__new__(Queue)
    queue.keys, queue._redis = Keys("q"), SimpleNamespace(xrange=xrange)
    return queue
