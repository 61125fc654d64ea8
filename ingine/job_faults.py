"""What is wrong with a job: found cheaply where it is meant to be costly, and told in one sentence."""

import re
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Any

import msgpack
from pydantic import ValidationError

from ingine.errors import ErrorCode

MAX_NESTING = 16
MAX_FIELDS = 64
MAX_MAP_ENTRIES = 1024
MAX_CONTAINERS = 8192
"""Maps and arrays of a job: each message is one."""
MAX_ENTRIES = 32_768
"""Of all maps of a job together."""
MAX_REASON_CHARS = 500
_CONTAINERS = frozenset({dict, list})

_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
}
"""pydantic's types of faults -> what the value must be."""


class TooManyParts(Exception):
    """Says of what there is too much."""


class BoundedContainers:
    """msgpack's hooks for maps and arrays, which bound what a job costs before anything is known of it.

    A container takes a hundred times as long as the byte that it may be, a map's entry ten times: of both
    there are so many at most. Of each map the first `MAX_MAP_ENTRIES` are kept: integers hash to themselves,
    so keys can be chosen that all collide. A map of 87,000 of them, in a job of 600 kB, took 8 s to build,
    with the interpreter's lock held and the leases unrenewed.
    """

    def __init__(self):
        self.num = self.num_entries = 0
        self.largest_map = 0

    def map(self, pairs: Iterable[tuple[Any, Any]]) -> dict:
        pairs = list(pairs)
        self.num_entries += len(pairs)
        self._count()
        self.largest_map = max(self.largest_map, len(pairs))
        return dict(pairs[:MAX_MAP_ENTRIES])

    def list(self, values: list) -> list:
        self._count()
        return values

    def _count(self) -> None:
        self.num += 1
        if self.num > MAX_CONTAINERS:
            raise TooManyParts(f"more than {MAX_CONTAINERS} maps and arrays, each message among them")
        if self.num_entries > MAX_ENTRIES:
            raise TooManyParts(f"maps of more than {MAX_ENTRIES} entries together")


def texts_of(raw: bytes, names: Container[str]) -> dict[str, str]:
    """Those fields of a job that are text, without building what else is in it: what else there is is skipped
    as fast as it can be read."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(raw)
    found: dict[str, str] = {}
    # Nothing is known of what comes behind the part that was too much: it may be damaged.
    with suppress(ValueError, IndexError, msgpack.UnpackException):
        for _ in range(min(unpacker.read_map_header(), MAX_FIELDS)):
            if not _is_text(raw[unpacker.tell()]):
                break
            name = unpacker.unpack()
            if name in names and _is_text(raw[unpacker.tell()]):
                found[name] = unpacker.unpack()
            else:
                unpacker.skip()
    return found


def _is_text(first_byte: int) -> bool:
    return 0xA0 <= first_byte <= 0xBF or 0xD9 <= first_byte <= 0xDB


def deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
        if not level:
            return False
    return True


def _children(parent: dict | list) -> Iterable[Any]:
    """None of an array without containers, which may be long."""
    if isinstance(parent, dict):
        return parent.values()
    return () if _CONTAINERS.isdisjoint(map(type, parent)) else parent


def too_many_fields(fields: dict) -> str | None:
    """Each unknown field is a fault to describe, at a hundred times its own size."""
    messages = fields.get("messages")
    for value in (fields, fields.get("sampling"), *(messages if isinstance(messages, list) else ())):
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            return f"a map of {len(value)} fields, which no part of a job has"
    return None


def longer_than(fields: dict, max_num_tokens: int | None) -> str | None:
    """What is wrong with a prompt of which is known, before it is read, that it has too many tokens."""
    for name in ("prompt", "messages"):
        value = fields.get(name)
        if max_num_tokens is not None and isinstance(value, list) and len(value) >= max_num_tokens:
            what = "tokens" if name == "prompt" else "messages, each of which is a token at least"
            return f"the prompt has {len(value)} {what}; the most is {max_num_tokens - 1}"
    return None


def explain(error: ValidationError) -> tuple[ErrorCode, str]:
    """The first fault, as a stable code and a sentence that names the field. Never quotes the value."""
    faults = error.errors(include_url=False)
    # Names that are no text make all required fields missing.
    first = next((fault for fault in faults if fault["type"] == "invalid_key"), faults[0])
    path = [printable(str(part)) for part in first["loc"]]
    if path[:1] == ["prompt"]:
        del path[1:2]  # which of the two kinds of prompt it was taken for
    where = ".".join(path) or "job"
    kind = first["type"]
    if path[-1:] == ["[key]"]:
        whose = ".".join(path[:-2])
        return ErrorCode.INVALID_TYPE, f"a key of `{whose}` must be {_KINDS.get(kind, 'another')}"
    if kind == "extra_forbidden":
        return ErrorCode.UNKNOWN_FIELD, f"unknown field `{where}`"
    if where == "v":
        return ErrorCode.UNSUPPORTED_VERSION, f"the protocol's version, `v`: {first['msg']}"
    if kind == "missing":
        return ErrorCode.INVALID_SHAPE, f"`{where}` is missing"
    if kind.endswith("_type") or kind == "invalid_key":
        return ErrorCode.INVALID_TYPE, _sentence(where, kind, first["msg"]) + _instead_of_text(first)
    if where == "job":
        return ErrorCode.INVALID_SHAPE, first["msg"].removeprefix("Value error, ")
    if where.startswith("prompt."):
        return ErrorCode.INVALID_TOKEN_ID, _sentence(where, kind, first["msg"])
    return ErrorCode.INVALID_PARAMETER, _sentence(where, kind, first["msg"].removeprefix("Value error, "))


def _sentence(where: str, kind: str, message: str) -> str:
    if where == "prompt" and kind in _KINDS:
        return "`prompt` must be text or a list of token ids"
    if kind in _KINDS:
        return f"`{where}` must be {_KINDS[kind]}"
    said, is_rule = re.subn(r"^\w+ should ", "must ", message)
    return f"`{where}` {said}" if is_rule else f"`{where}`: {message}"


def _instead_of_text(fault: dict) -> str:
    if fault["type"] not in ("string_type", "invalid_key") or not isinstance(fault["input"], bytes):
        return ""
    return ", not bytes: pack text as msgpack's str, not as bin"


def printable(name: str) -> str:
    """Of a field: its sender's choice, and shown on an operator's terminal."""
    return "".join(char if char.isprintable() else "?" for char in name[:MAX_REASON_CHARS])
