"""Entries of a replies stream."""

from random import Random

import msgpack

from benchmarks.fuzz import events
from benchmarks.fuzz.mutations import text_bytes
from benchmarks.fuzz.running import outcome
from ingine.errors import ClientError
from ingine.wire import JobStatus
from producer.replies import _reply


def cases(rng: Random) -> bytes:
    field = b"event" if rng.random() < 0.95 else text_bytes(rng)
    return msgpack.packb({field: events.cases(rng)})


def check(case: bytes) -> str:
    reply, result = outcome(lambda: _reply(msgpack.unpackb(case), "1-0"), ClientError)
    if reply is not None:
        assert type(reply.job_id) is str and type(reply.status) is JobStatus
        assert type(reply.usage) is dict and type(reply.error or {}) is dict
    return result
