"""Make the costliest jobs that a queue's limits let in, one of each kind, as msgpack.

This module imports nothing of ingine, so the jobs are the same for every version.
"""

from collections.abc import Callable
from typing import Any

import msgpack

MIB = 1 << 20
ENVELOPE = 600
"""Bytes left for the rest of a job."""

STOPS = ["a" * 1023 + chr(0x100 + number) for number in range(16)]


def _text(piece: str) -> str:
    return piece * ((MIB - ENVELOPE) // len(piece.encode()))


def _list(element: Any) -> list:
    return [element] * ((MIB - ENVELOPE) // len(msgpack.packb(element)))


def _deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


FIELDS: dict[str, Callable[[], dict[str, Any]]] = {
    "a small job": lambda: {"prompt": "hello", "sampling": {"max_tokens": 8}},
    "text: digits": lambda: {"prompt": _text("1234567890")},
    "text: one letter": lambda: {"prompt": _text("a")},
    "text: spaces": lambda: {"prompt": _text(" ")},
    "text: words": lambda: {"prompt": _text("the quick brown fox ")},
    "text: emoji": lambda: {"prompt": _text("\N{GRINNING FACE}")},
    "token ids of 1 byte": lambda: {"prompt": _list(1)},
    "token ids of 3 bytes": lambda: {"prompt": _list(30_000)},
    "messages without content": lambda: {"messages": _list({"role": "u", "content": ""})},
    "4,096 messages": lambda: {"messages": [{"role": "user", "content": "x" * 200}] * 4096},
    "one long message": lambda: {"messages": [{"role": "user", "content": _text("1234567890")}]},
    "a message that is a list": lambda: {"messages": [{"role": "u", "content": _list([])}]},
    "stop strings": lambda: {"prompt": "a", "sampling": {"stop": STOPS, "max_tokens": 64}},
    "biases and stop tokens": lambda: {
        "prompt": "a",
        "sampling": {
            "logit_bias": {number: 1.5 for number in range(200)},
            "stop_token_ids": list(range(200)),
            "min_tokens": 60,
            "max_tokens": 64,
        },
    },
    "penalties": lambda: {
        "prompt": list(range(200)),
        "sampling": {"repetition_penalty": 1.1, "frequency_penalty": 1.0, "max_tokens": 64},
    },
    "log probabilities": lambda: {"prompt": "a", "sampling": {"logprobs": 20, "max_tokens": 200}},
    "metadata: the largest": lambda: {
        "prompt": "a",
        "metadata": {"a": "x" * 16_000},
        "sampling": {"max_tokens": 4},
    },
    "metadata: the deepest": lambda: {
        "prompt": "a",
        "metadata": {"a": [_deep(12)] * 600},
        "sampling": {"max_tokens": 4},
    },
    "metadata: maps": lambda: {"prompt": "a", "metadata": {"a": _list({})}},
    "metadata: lists": lambda: {"prompt": "a", "metadata": {"a": _list([])}},
    "metadata: keys that collide": lambda: {
        "prompt": "a",
        "metadata": {"a": [{number << 32: 0 for number in range(1024)}] * 100},
    },
    "unknown fields": lambda: {"prompt": "a", **{f"field-{number}": 1 for number in range(60_000)}},
    "an unknown field of maps": lambda: {"prompt": "a", "text": _list({})},
    "an unknown model": lambda: {"prompt": _text("the quick brown fox "), "model": "m" * 256},
}
"""Kind -> the fields of such a job, without its id."""

BYTES: dict[str, Callable[[], bytes]] = {
    "bad msgpack: behind many maps": lambda: msgpack.packb({"messages": _list({})}) + b"\xc1",
    "bad msgpack: spaces": lambda: b"{" + b" " * (MIB - 1),
    "bad msgpack: letters": lambda: b"A" * MIB,
    "bad msgpack: lists": lambda: msgpack.packb(_list([])),
}
"""Kind -> bytes that are no job, and have no id."""

FOREIGN = "an entry of other fields"
DUPLICATE = "a duplicate id"
KINDS = (*FIELDS, *BYTES, FOREIGN, DUPLICATE)


class JobMaker:
    """Makes entries of any kind. The large part of each is made once."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[int, bytes]] = {}

    def entry(self, kind: str, job_id: str, **more: Any) -> dict[str, bytes]:
        """The fields for XADD. more: other fields of the job."""
        if kind == FOREIGN:
            return {f"field-{number}": b"x" for number in range(50_000)}
        if kind not in self._made:
            self._made[kind] = _make("text: words" if kind == DUPLICATE else kind)
        num_fields, packed = self._made[kind]
        if kind in BYTES:
            return {"job": packed}
        # Packed fields can be concatenated: only the head of a map has their number.
        envelope = _pack_fields({"id": job_id} | more)
        return {"job": b"\xdf" + (num_fields + 1 + len(more)).to_bytes(4, "big") + envelope + packed}


def _make(kind: str) -> tuple[int, bytes]:
    if kind in BYTES:
        return 0, BYTES[kind]()
    fields = FIELDS[kind]()
    return len(fields), _pack_fields(fields)


def _pack_fields(fields: dict[str, Any]) -> bytes:
    return b"".join(msgpack.packb(name) + msgpack.packb(value) for name, value in fields.items())
