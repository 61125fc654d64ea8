"""Checks of the arguments of a client's calls. Any value with one plain meaning is accepted; the error for
any other value names the argument."""

import operator
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ingine.contract.jobs import JOB_ID
from ingine.errors import InvalidArgument

ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?")


def seconds(name: str, value: Any) -> float:
    """Convert a number of any type, or a timedelta, to seconds. Raises InvalidArgument."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    return _as_float(name, "a number of seconds or a timedelta", value)


def timeout(value: Any) -> float | None:
    """Convert a timeout to seconds; None stays None. Raises InvalidArgument."""
    return None if value is None else seconds("timeout", value)


def integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Convert an integer of any type, numpy's included. Raises InvalidArgument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(name, "an integer", value) from None
    if at_least is not None and number < at_least:
        raise InvalidArgument(f"{name} is at least {at_least}, not {number}")
    return number


def number(name: str, value: Any) -> float:
    """Convert a number of any type; an int stays one. Raises InvalidArgument."""
    converted = _as_float(name, "a number", value)
    return value if isinstance(value, int) else converted


def _as_float(name: str, kind: str, value: Any) -> float:
    if isinstance(value, str | bytes | bool) or not hasattr(value, "__float__"):
        raise _wrong(name, kind, value)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several numbers, or an int over 1e308
        raise _wrong(name, kind, value) from None


def job_id(value: Any) -> str:
    """Return `value` if it is a valid job id. Raises InvalidArgument."""
    if isinstance(value, str) and JOB_ID.fullmatch(value):
        return value
    raise InvalidArgument(f"job_id must be 1 to 128 of A-Z a-z 0-9 _ . : -, not {repr(value)[:150]}")


def text(name: str, value: Any) -> str:
    """Return `value` if it is a string. Raises InvalidArgument."""
    if isinstance(value, str):
        return value
    raise _wrong(name, "a string", value)


def _wrong(name: str, kind: str, value: Any) -> InvalidArgument:
    return InvalidArgument(f"{name} must be {kind}, not {type(value).__name__} {repr(value)[:50]}")


def plain(value: Any) -> Any:
    """Convert what msgpack cannot encode: numpy's scalars and arrays, and any other sequence or mapping.

    Serves as msgpack's `default`. Raises TypeError for any other value.
    """
    if callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")
