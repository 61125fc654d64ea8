"""Find the fault of an invalid job at a bounded cost, and describe it in one sentence."""

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
"""Limit for the maps and arrays of a job. Each message is one."""
MAX_ENTRIES = 32_768
"""Limit for the entries of all maps of a job together."""
MAX_FIELD_BYTES = 256 << 10
"""Limit for each field but `prompt` and `messages`. The largest valid `sampling` has 180 kB and a grammar."""
MAX_REASON_CHARS = 500
_CONTAINERS = frozenset({dict, list})
PROMPT, MESSAGES = msgpack.packb("prompt"), msgpack.packb("messages")

_KINDS = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a map",
    "model_type": "a map",
}
"""Type of pydantic's error -> the type that the value must have."""

_UNIONS = ((0, "prompt"), (0, "tool_choice"), (2, "content"))
"""Fields that may have several types: position in the path of a fault, and name."""


class TooManyParts(Exception):
    """The job exceeds a limit, which the message names."""

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INVALID_SHAPE):
        super().__init__(message)
        self.code = code


class BoundedContainers:
    """msgpack's hooks for maps and arrays, which bound the cost of decoding a job that is not validated yet.

    A container may be a single byte and takes a hundred times as long to decode, a map's entry ten times: the
    number of both is limited. Only the first `MAX_MAP_ENTRIES` of a map are kept: integers hash to
    themselves, so a client can choose keys that all collide. A map of 87,000 of them, in a job of 600 kB,
    took 8 s to build, during which the interpreter's lock was held and no lease was renewed.
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


def check_sizes(raw: bytes, max_num_tokens: int | None) -> None:
    """Raise TooManyParts if a part of a job is too large, without building any values.

    To skip a million values takes two milliseconds, to build them a hundred. Ignores damaged bytes, which the
    decoder reports.
    """
    reader = msgpack.Unpacker(strict_map_key=False, max_buffer_size=0)
    reader.feed(raw)
    with suppress(ValueError, IndexError, msgpack.UnpackException):
        if (num_fields := reader.read_map_header()) > MAX_MAP_ENTRIES:
            raise TooManyParts(f"a map of {num_fields} entries, and {MAX_MAP_ENTRIES} is the limit")
        for _ in range(num_fields):
            name_at = reader.tell()
            reader.skip()
            value_at = reader.tell()
            reader.skip()
            _check_size(raw[name_at:value_at], raw[value_at : reader.tell()], max_num_tokens)


def _check_size(name: bytes, value: bytes, max_num_tokens: int | None) -> None:
    if name not in (PROMPT, MESSAGES):
        if len(value) > MAX_FIELD_BYTES:
            message = f"a field of {len(value)} bytes, which only `prompt` and `messages` may have"
            raise TooManyParts(message)
    elif name == PROMPT and max_num_tokens is not None and _is_array(value[0]):
        reader = msgpack.Unpacker()
        reader.feed(value[:5])
        if (num_tokens := reader.read_array_header()) >= max_num_tokens:
            message = f"the prompt has {num_tokens} tokens; the most is {max_num_tokens - 1}"
            raise TooManyParts(message, ErrorCode.PROMPT_TOO_LONG)


def texts_of(raw: bytes, names: Container[str]) -> dict[str, str]:
    """Return those fields of `names` that are text. All other values are skipped without building them."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)
    unpacker.feed(raw)
    found: dict[str, str] = {}
    # The bytes after a part that exceeds a limit were not read: they may be damaged.
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


def _is_array(first_byte: int) -> bool:
    return 0x90 <= first_byte <= 0x9F or first_byte in (0xDC, 0xDD)


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
    """Return the values of a container. Returns none for an array without containers, which may be long."""
    if isinstance(parent, dict):
        return parent.values()
    return () if _CONTAINERS.isdisjoint(map(type, parent)) else parent


def too_many_fields(fields: dict) -> str | None:
    """Describe a map with too many fields, since pydantic's error for each has a hundred times its size."""
    messages = fields.get("messages")
    for value in (fields, fields.get("sampling"), *(messages if isinstance(messages, list) else ())):
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            return f"a map of {len(value)} fields, which no part of a job has"
    return None


def longer_than(fields: dict, max_num_tokens: int | None) -> str | None:
    """Describe a prompt whose length alone shows that it has too many tokens."""
    for name in ("prompt", "messages"):
        value = fields.get(name)
        if max_num_tokens is not None and isinstance(value, list) and len(value) >= max_num_tokens:
            what = "tokens" if name == "prompt" else "messages, each of which is a token at least"
            return f"the prompt has {len(value)} {what}; the most is {max_num_tokens - 1}"
    return None


def explain(error: ValidationError) -> tuple[ErrorCode, str]:
    """Return the first fault as a stable code and a sentence that names the field. Never quotes the value."""
    faults = error.errors(include_url=False)
    # Where field names are not text, pydantic reports all required fields as missing too.
    first = next((fault for fault in faults if fault["type"] == "invalid_key"), faults[0])
    path = [printable(str(part)) for part in first["loc"]]
    for at, name in _UNIONS:
        if path[at : at + 1] == [name]:
            del path[at + 1 : at + 2]  # the type that the value was taken for
    where = ".".join(path) or "job"
    kind = first["type"]
    if path[-1:] == ["[key]"]:
        parent = ".".join(path[:-2])
        return ErrorCode.INVALID_TYPE, f"a key of `{parent}` must be {_KINDS.get(kind, 'another')}"
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
    """Replace unprintable characters: clients choose names, and operators see them on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in name[:MAX_REASON_CHARS])
