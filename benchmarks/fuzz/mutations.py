"""Damage valid inputs: their bytes, and the values that they encode."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import msgpack

INTEGERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
NUMBERS = (0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    *("", " ", "0", "1", "-5", "1.5", "007", "1e999", "nan", "inf", "-inf", "0x10", "1_000", "٣", "9" * 30),
    *("x", "\x00", "\n", "\x1b[2J", "\x1b]0;x\x07", "\x9b31m", "é", "🦀", "%s", "{}", "../..", "tokens"),
    *("finished", "failed", "running", "queued", "delayed", "high", "drain", "cancel", "x" * 300),
)


@dataclass(frozen=True)
class Values:
    """Sources of the values that changes insert: scalars, and keys of maps."""

    scalar: Callable[[Random], Any]
    key: Callable[[Random], Any]


def any_scalar(rng: Random) -> Any:
    """Draw a scalar of msgpack's types."""
    match rng.randrange(9):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice(INTEGERS)
        case 3:
            return rng.choice(NUMBERS)
        case 4:
            return rng.randbytes(rng.randrange(5))
        case 5:
            return msgpack.ExtType(rng.randrange(128), rng.randbytes(2))
        case 6:
            return msgpack.Timestamp(rng.randrange(2**34), rng.randrange(10**9))
        case _:
            return rng.choice(TEXTS)


def json_scalar(rng: Random) -> Any:
    """Draw a scalar of JSON's types, as Python's reader accepts them."""
    match rng.randrange(6):
        case 0:
            return None
        case 1:
            return rng.random() < 0.5
        case 2:
            return rng.choice((*INTEGERS, 10**400))
        case 3:
            return rng.choice(NUMBERS)
        case _:
            return rng.choice((*TEXTS, "\ud800"))


ANY = Values(any_scalar, lambda rng: rng.choice((*TEXTS, 0, 7, b"x", None, 1.5, True)))
JSON = Values(json_scalar, lambda rng: rng.choice((*TEXTS, "\ud800")))


def text_bytes(rng: Random) -> bytes:
    """Draw bytes like those of hash fields, which are text most often."""
    return rng.randbytes(rng.randrange(9)) if rng.random() < 0.2 else rng.choice(TEXTS).encode()


def any_value(rng: Random, values: Values = ANY, depth: int = 2) -> Any:
    if depth and rng.random() < 0.3:
        inner = [any_value(rng, values, depth - 1) for _ in range(rng.randrange(4))]
        return inner if rng.random() < 0.5 else {values.key(rng): value for value in inner}
    return values.scalar(rng)


def nested(rng: Random, levels: Sequence[int] = (15, 16, 17, 40, 600)) -> Any:
    value: Any = []
    for _ in range(rng.choice(levels)):
        value = [value] if rng.random() < 0.7 else {"a": value}
    return value


def changed(rng: Random, value: Any, values: Values = ANY) -> Any:
    """Copy `value`, and change the copy in some places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _change(rng, value, values)
    return value


def _change(rng: Random, value: Any, values: Values) -> Any:
    if not (isinstance(value, dict | list) and value and rng.random() < 0.9):
        return nested(rng) if rng.random() < 0.03 else any_value(rng, values)
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match rng.randrange(10):
        case 0:
            del value[place]
        case 1 if isinstance(value, dict):
            value[values.key(rng)] = any_value(rng, values)
        case 1:
            value.insert(place, any_value(rng, values))
        case 2:
            value[place] = [value[place]]
        case 3 if isinstance(value, list) and isinstance(value[place], dict | list):
            value.append(value[place])
        case 3 if isinstance(value, list):
            value += [value[place]] * rng.choice((2, 50, 1500))
        case 3:
            value |= {f"{number}": any_value(rng, values, 0) for number in range(rng.choice((3, 70, 1100)))}
        case _:
            value[place] = _change(rng, value[place], values)
    return value


def damaged(rng: Random, raw: bytes, words: Sequence[bytes] = (b"\x00", b"\xff\xff\xff\xff")) -> bytes:
    """Cut out, flip, repeat or overwrite some places of `raw`, or insert one of `words`."""
    mutable = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(mutable) + 1), rng.choice((0, 1, 1, 2, 4, 16, 300))
        match rng.randrange(6):
            case 0:
                del mutable[place : place + length]
            case 1:
                mutable[place : place + length] = rng.randbytes(length)
            case 2:
                mutable[place:place] = rng.choice(words)
            case 3:
                mutable[place:place] = mutable[place : place + length] * rng.choice((1, 2, 50))
            case 4:
                del mutable[place:]
            case _ if place < len(mutable):
                mutable[place] ^= 1 << rng.randrange(8)
    return bytes(mutable)


def packed_case(rng: Random, valid: Any) -> bytes:
    """Pack `valid` after changes to its values, or damage the bytes, or both."""
    value = valid
    if rng.random() < 0.8:
        value = changed(rng, valid) if rng.random() < 0.95 else any_value(rng)
    try:
        raw = msgpack.packb(value)
    except (ValueError, TypeError, OverflowError):  # nested too deep to be packed
        raw = msgpack.packb(valid)
    return damaged(rng, raw) if rng.random() < 0.3 else raw


def fields_case(rng: Random, valid: dict[bytes, bytes]) -> bytes:
    """Pack the fields of a hash or of an entry, and change some of them before. See `read_fields`."""
    fields = dict(valid)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        name = rng.choice(list(fields) or [b"x"])
        match rng.randrange(6):
            case 0:
                fields.pop(name, None)
            case 1:
                fields[text_bytes(rng)] = text_bytes(rng)
            case 2 if fields.get(name):
                fields[name] = damaged(rng, fields[name])
            case _:
                fields[name] = text_bytes(rng)
    return msgpack.packb(fields)


def read_fields(case: bytes) -> dict[bytes, bytes]:
    return msgpack.unpackb(case, strict_map_key=False)
