"""Fuzz entries of a replies stream."""

from random import Random

import msgpack

from benchmarks.fuzz import events
from benchmarks.fuzz.logs import LONGEST_MESSAGE
from benchmarks.fuzz.mutations import text_bytes
from ingine.contract.record import JobStatus
from ingine.errors import ClientError
from ingine.producer.replies import _reply


def cases(rng: Random) -> bytes:
    field = b"event" if rng.random() < 0.95 else text_bytes(rng)
    return msgpack.packb({field: events.cases(rng)})


def check(case: bytes) -> str:
    try:
        reply = _reply(msgpack.unpackb(case), "1-0")
    except ClientError as error:
        assert len(str(error)) <= LONGEST_MESSAGE
        return "refused"
    assert type(reply.job_id) is str and type(reply.status) is JobStatus
    assert type(reply.usage) is dict and type(reply.error or {}) is dict
    return "valid"
