"""Fuzz dead letters, which any client may have written: they are listed, shown and requeued."""

import contextlib
import dataclasses
import io
from random import Random

import msgpack

from benchmarks.fuzz import jobs
from benchmarks.fuzz.mutations import fields_case
from ingine.cli.options import print_fields
from ingine.contract.keys import Keys
from ingine.producer.control import _age, _dead_letter
from tests.security.wire_properties import FULL_JOB, packed

LETTER = {
    b"job": packed(FULL_JOB), b"code": b"bad_record", b"reason": b"x", b"stream": b"ingine:{q}:jobs:normal",
    b"entry": b"1700000000000-0", b"deliveries": b"3", b"worker": b"w-1",
}  # fmt: skip


def cases(rng: Random) -> bytes:
    fields = msgpack.unpackb(fields_case(rng, LETTER), strict_map_key=False)
    if rng.random() < 0.3:
        fields[b"job"] = jobs.cases(rng)
    return msgpack.packb([rng.choice((b"1-0", b"18446744073709551615-18446744073709551615")), fields])


def check(case: bytes) -> str:
    entry_id, fields = msgpack.unpackb(case, strict_map_key=False)
    for partition in (None, 3):
        letter = _dead_letter(Keys("q", partition), entry_id, fields)
        assert len(_age(letter)) == 2 and letter.deliveries >= 0
    with contextlib.redirect_stdout(io.StringIO()):
        for as_json in (False, True):
            print_fields(dataclasses.asdict(letter), as_json)
    return "with an id" if letter.job_id else "without"
