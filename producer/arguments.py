"""Arguments of a client's calls: what is plainly meant is taken, all else is an error that names it."""

import operator
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from ingine.contract.jobs import JOB_ID
from ingine.errors import InvalidArgument

ENTRY_ID = re.compile(r"\d{1,20}(-\d{1,20})?")


def seconds(name: str, value: Any) -> float:
    """A number of any type, or a timedelta. Raises InvalidArgument."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if not isinstance(value, str | bytes | bool) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise _wrong(name, "a number of seconds or a timedelta", value)


def timeout(value: Any) -> float | None:
    return None if value is None else seconds("timeout", value)


def integer(name: str, value: Any, *, at_least: int | None = None) -> int:
    """Raises InvalidArgument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise _wrong(name, "an integer", value) from None
    if at_least is not None and number < at_least:
        raise InvalidArgument(f"{name} is at least {at_least}, not {number}")
    return number


def number(name: str, value: Any) -> float:
    """Raises InvalidArgument."""
    if isinstance(value, int | float):
        return value
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise _wrong(name, "a number", value)
    return float(value)


def job_id(value: Any) -> str:
    """Raises InvalidArgument for what can be no job's id."""
    if isinstance(value, str) and JOB_ID.fullmatch(value):
        return value
    raise InvalidArgument(f"job_id must be 1 to 128 of A-Z a-z 0-9 _ . : -, not {repr(value)[:150]}")


def text(name: str, value: Any) -> str:
    """Raises InvalidArgument."""
    if isinstance(value, str):
        return value
    raise _wrong(name, "a string", value)


def _wrong(name: str, kind: str, value: Any) -> InvalidArgument:
    return InvalidArgument(f"{name} must be {kind}, not {type(value).__name__} {repr(value)[:50]}")


def plain(value: Any) -> Any:
    """msgpack's `default`: for numpy's scalars and arrays and their like, all sequences and mappings."""
    if callable(tolist := getattr(value, "tolist", None)):
        return tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent")
