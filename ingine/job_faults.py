"""What is wrong with a job: found cheaply where it is meant to be costly, and told in one sentence."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from ingine.errors import ErrorCode

MAX_NESTING = 16
MAX_FIELDS = 64
MAX_MAP_ENTRIES = 1024
MAX_REASON_CHARS = 500

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


class BoundedMaps:
    """msgpack's `object_pairs_hook`: keeps each map's first `MAX_MAP_ENTRIES`, and the largest number met.

    Integers hash to themselves, so keys can be chosen that all collide: a map of 87,000 of them, in a job of
    600 kB, took 8 s to build, with the interpreter's lock held and the leases unrenewed.
    """

    def __init__(self):
        self.largest = 0

    def __call__(self, pairs: Iterable[tuple[Any, Any]]) -> dict:
        pairs = list(pairs)
        self.largest = max(self.largest, len(pairs))
        return dict(pairs[:MAX_MAP_ENTRIES])


def deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def too_many_fields(fields: dict) -> str | None:
    """Each unknown field is a fault to describe, at a hundred times its own size."""
    messages = fields.get("messages")
    for value in (fields, fields.get("sampling"), *(messages if isinstance(messages, list) else ())):
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            return f"a map of {len(value)} fields, which no part of a job has"
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
