"""Entries in the formats of other queues, and of beginners: the error names the format, and what to do."""

import base64
import gzip
import json
import pickle

import msgpack
import pytest

from ingine.contract.foreign_formats import no_job_field
from ingine.contract.jobs import decode_job
from ingine.errors import ErrorCode, InvalidJob

JOB = {"v": 1, "id": "a", "prompt": "hello"}
PACKED = msgpack.packb(JOB)

NOT_MSGPACK = {
    "JSON": (json.dumps(JOB).encode(), "looks like JSON: encode the job with msgpack"),
    "indented JSON": (json.dumps(JOB, indent=2).encode() + b"\n", "looks like JSON"),
    "celery": (json.dumps([["hello"], {}, {"callbacks": None}]).encode(), "looks like JSON"),
    "base64": (base64.b64encode(PACKED), "looks like base64 of msgpack: send the bytes themselves"),
    "base64 for URLs": (base64.urlsafe_b64encode(PACKED), "looks like base64 of msgpack"),
    "pickle": (pickle.dumps(JOB), "looks like a Python pickle: encode the job with msgpack"),
    "old pickle": (pickle.dumps(JOB, protocol=2), "looks like a Python pickle"),
    "gzip": (gzip.compress(PACKED), "looks like gzip"),
    "repr": (repr(JOB).encode(), "looks like text: encode the job with msgpack"),
    "text": (b"Why is the sky blue?", "looks like text"),
    "nothing": (b"", "it is empty"),
    "cut off": (PACKED[:-1], "incomplete input"),
}


@pytest.mark.parametrize("name", NOT_MSGPACK)
def test_what_is_no_msgpack_is_called_by_its_name(name):
    raw, says = NOT_MSGPACK[name]
    with pytest.raises(InvalidJob, match=says) as caught:
        decode_job(raw)
    assert caught.value.code is ErrorCode.NOT_MSGPACK


NOT_A_MAP = {
    "taskiq's arguments": (["hello", {}], "not an array"),
    "JSON in a string": (json.dumps(JOB), "not a string, and looks like JSON inside: pack the map itself"),
    "msgpack in base64 in a string": (
        base64.b64encode(PACKED).decode(),
        "looks like base64 of msgpack inside",
    ),
    "JSON as bytes": (json.dumps(JOB).encode(), "not binary, and looks like JSON inside"),
    "a number": (7, "not an integer"),
    "nil": (None, "not nil"),
}


@pytest.mark.parametrize("name", NOT_A_MAP)
def test_what_is_no_map_is_called_by_its_type(name):
    value, says = NOT_A_MAP[name]
    with pytest.raises(InvalidJob, match=f"a job is a msgpack map .*{says}") as caught:
        decode_job(msgpack.packb(value))
    assert caught.value.code is ErrorCode.INVALID_SHAPE


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"messages": [{"role": b"user", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": b"x"}]}, "messages.0.content"),
        ({"prompt": b"x"}, "prompt"),
        ({"prompt": "x", "model": b"m"}, "model"),
    ],
)
def test_bytes_instead_of_text(fields, where):
    with pytest.raises(InvalidJob, match=rf"`{where}` .*not bytes: pack text as msgpack's str") as caught:
        decode_job(msgpack.packb({"id": "a"} | fields))
    assert (caught.value.code, caught.value.job_id) == (ErrorCode.INVALID_TYPE, "a")


def test_bytes_for_names():
    with pytest.raises(InvalidJob, match="not bytes: pack text as msgpack's str"):
        decode_job(msgpack.packb({name.encode(): value for name, value in JOB.items()}))


def test_the_fields_of_an_entry_without_a_job_are_named():
    assert no_job_field([b"data", b"\xff\x1b[1m"]).endswith(
        "this entry has `data`, `\N{REPLACEMENT CHARACTER}?[1m`"
    )
    assert no_job_field([b"x" * 1000] * 100).endswith("`, ...")
    assert len(no_job_field([b"x" * 1000] * 100)) < 1000
