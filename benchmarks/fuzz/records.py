"""Fuzz records of jobs: `status` shows one, and a listing reads it beside the job's entry."""

import dataclasses
import json
from random import Random

import msgpack

from benchmarks.fuzz import jobs
from benchmarks.fuzz.mutations import fields_case, text_bytes
from benchmarks.fuzz.running import outcome
from ingine.contract.keys import Keys, Priority
from ingine.errors import ClientError
from ingine.producer.listing import _FIELDS, WAITING, _found, _of_entry, _priority, _Raw, _text
from ingine.producer.queue_jobs import _call, _order
from ingine.producer.results import JobInfo
from tests.security.wire_properties import FULL_JOB, packed

RECORD = {
    b"status": b"running", b"position": b"4", b"attempt": b"1", b"deaths": b"0", b"entry": b"1700000000000-0",
    b"priority": b"normal", b"worker": b"w-1", b"cancel": b"1", b"reply_to": b"r", b"idempotency_key": b"k",
    b"submitted_at": b"1700000000000", b"began_at": b"1700000000001", b"first_token_at": b"1700000000002",
    b"finished_at": b"1700000000003", b"deadline_at": b"1700000009000", b"tenant": b"t", b"cost": b"9",
    b"raw": packed(FULL_JOB), b"lease_ms": b"15000", b"nonce": b"x",
}  # fmt: skip
ENTRY = {b"job": packed(FULL_JOB), b"tenant": b"t", b"cost": b"9"}
NOW_MS = 1_700_000_001_000


def cases(rng: Random) -> bytes:
    record, entry = fields_case(rng, RECORD), fields_case(rng, ENTRY)
    fields = msgpack.unpackb(record, strict_map_key=False), msgpack.unpackb(entry, strict_map_key=False)
    if rng.random() < 0.3:
        fields[1][b"job"] = jobs.cases(rng)
    entry_id = rng.choice((b"1700000000000-0", b"18446744073709551615-18446744073709551615", b"0-1"))
    return msgpack.packb([*fields, entry_id, text_bytes(rng)])


def check(case: bytes) -> str:
    record, entry, entry_id, delayed_id = msgpack.unpackb(case, strict_map_key=False)
    info, result = None, "no status"
    if b"status" in record:  # `status` of a job without one is a JobNotFound
        info, result = outcome(lambda: JobInfo.from_record("a", record), ClientError)
    if info is not None:
        assert json.dumps(dataclasses.asdict(info))
    listed = [
        _found(raw, [record.get(name.encode()) for name in _FIELDS], NOW_MS)
        for raw in (_of_entry(Priority.NORMAL, entry_id, entry), _delayed(delayed_id, record))
    ]
    shown = [found for found in listed if found is not None]
    for found in shown:
        assert json.dumps(dataclasses.asdict(found.listed)) and found.listed.age_s >= 0
        if found.listed.job_id and found.listed.status in WAITING:
            assert _call(Keys("q"), found)
    sorted(map(_order, (found.listed for found in shown)))
    return f"{result}, {len(shown)} listed"


def _delayed(job_id: bytes, record: dict[bytes, bytes]) -> _Raw:
    raw = record.get(b"raw") or b""
    return _Raw(_text(job_id), _priority(record.get(b"priority")), None, raw, _text(record.get(b"tenant")))
