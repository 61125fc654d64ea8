"""Recognise what a client sent in place of a msgpack map, and say how to correct it."""

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any

from ingine.contract.faults import printable

MAX_NAMES = 8
MAX_INDENT = 1024
"""Bytes that are searched for the beginning of JSON, which only white space may precede."""

_JSON = re.compile(rb'\s*(\{\s*["}]|\[)')
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{8,}={0,2}\s*")
_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_TYPES = {list: "an array", str: "a string", bytes: "binary", int: "an integer", bool: "a boolean"}


def recognise(raw: bytes) -> str | None:
    """Say what `raw`, which is no msgpack map, looks like and what to do. None if it is not recognised."""
    if not raw:
        return "it is empty"
    if _JSON.match(raw[:MAX_INDENT]) and raw.rstrip()[-1:] in (b"}", b"]"):
        return "this looks like JSON: encode the job with msgpack"
    if raw.startswith(b"\x1f\x8b"):
        return "this looks like gzip: a job is not compressed"
    if _PICKLE.match(raw) and raw.endswith(b"."):
        return "this looks like a Python pickle: encode the job with msgpack"
    if _is_base64_map(raw):
        return "this looks like base64 of msgpack: send the bytes themselves"
    if raw[:64].isascii() and raw[:64].decode("ascii").replace("\n", " ").isprintable():
        return "this looks like text: encode the job with msgpack"
    return None


def not_a_map(value: Any) -> str:
    """Describe a msgpack value that is no map."""
    kind = _TYPES.get(type(value), "nil" if value is None else type(value).__name__)
    message = f"a job is a msgpack map with the fields of docs/protocol.md, not {kind}"
    inner = value.encode("utf-8", "replace") if isinstance(value, str) else value
    if isinstance(inner, bytes) and (found := recognise(inner)):
        message += f", and {found.partition(':')[0].removeprefix('this ')} inside: pack the map itself"
    return message


def no_job_field(names: Iterable[bytes]) -> str:
    """Describe a stream entry without the field `job`."""
    names = list(names)
    shown = ", ".join(f"`{printable(name[:64].decode(errors='replace'))}`" for name in names[:MAX_NAMES])
    more = ", ..." if len(names) > MAX_NAMES else ""
    return f"a job is the value of the entry's field `job`, in msgpack; this entry has {shown}{more}"


def _is_base64_map(raw: bytes) -> bool:
    if not _BASE64.fullmatch(raw):
        return False
    try:
        first = base64.urlsafe_b64decode(raw[:4].replace(b"+", b"-").replace(b"/", b"_"))[0]
    except binascii.Error:
        return False
    return 0x80 <= first <= 0x8F or first in (0xDE, 0xDF)
