"""JSON as it is written: passed on or decoded piece by piece, without ever going back."""

import re
from collections.abc import Callable

from ingine.engine.parsers.reader import Parsing, Reader

Emit = Callable[[str], None]

_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN_STRINGS = re.compile(r'[^"{}\[\]<]*')
_SCALAR = re.compile(r"[A-Za-z0-9.+-]*")
_CODE_UNIT = re.compile(r"\\u([0-9a-fA-F]{4})")
_ESCAPES = {"\\" + char: meaning for char, meaning in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True)}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def container(reader: Reader, emit: Emit, closing: str = "") -> Parsing[None]:
    """Emit the object or array that comes next as it is written, to where its brackets balance.

    One that is malformed goes on to the marker `closing` outside a string, or to the end of the text.
    """
    depth = 0
    while True:
        emit(reader.run(_BETWEEN_STRINGS))
        char = yield from reader.look(1)
        if char == "":
            return
        if char == '"':
            yield from _string_as_written(reader, emit)
            continue
        if closing and char == closing[0] and (yield from reader.starts_with(closing)):
            return
        emit(reader.take(1))
        depth += (char in "{[") - (char in "}]")
        if depth <= 0 and char in "}]":
            return


def _string_as_written(reader: Reader, emit: Emit) -> Parsing[None]:
    emit(reader.take(1))
    while True:
        emit(reader.run(_IN_STRING))
        char = yield from reader.look(1)
        emit(reader.take(1))
        if char == "\\":
            yield from reader.look(1)
            emit(reader.take(1))
        elif char in ('"', ""):
            return


def string(reader: Reader, emit: Emit) -> Parsing[bool]:
    """Emit what the string that comes next stands for. Returns whether it has ended.

    Half of a surrogate pair becomes U+FFFD; an escape that JSON does not know stands for itself.
    """
    reader.take(1)
    while True:
        emit(reader.run(_IN_STRING))
        char = yield from reader.look(1)
        if char == "":
            return False
        if char == '"':
            reader.take(1)
            return True
        if char == "\\":
            emit((yield from _escape(reader)))


def _escape(reader: Reader) -> Parsing[str]:
    if (yield from reader.look(2)) != r"\u":
        written = reader.take(2)
        return _ESCAPES.get(written, written)
    unit = yield from _code_unit(reader)
    if unit is None:
        return reader.take(2)
    reader.take(6)
    if 0xD800 <= unit < 0xDC00:
        low = yield from _code_unit(reader)
        if low is not None and 0xDC00 <= low < 0xE000:
            reader.take(6)
            return chr(0x10000 + ((unit - 0xD800) << 10) + low - 0xDC00)
    return REPLACEMENT if 0xD800 <= unit < 0xE000 else chr(unit)


def _code_unit(reader: Reader) -> Parsing[int | None]:
    r"""Return the value of the \uXXXX that comes next, without taking it; None if something else comes."""
    if not (yield from reader.starts_with(r"\u")):
        return None
    written = _CODE_UNIT.fullmatch((yield from reader.look(6)))
    return int(written[1], 16) if written else None


def text(reader: Reader) -> Parsing[str | None]:
    """The string that comes next; None where none does, or it does not end."""
    if (yield from reader.look(1)) != '"':
        return None
    pieces: list[str] = []
    has_ended = yield from string(reader, pieces.append)
    return "".join(pieces) if has_ended else None


def scalar(reader: Reader) -> Parsing[str]:
    """A number, true, false or null as it is written; "" where none comes."""
    return (yield from reader.whole(_SCALAR))


def skip_value(reader: Reader) -> Parsing[None]:
    """Take whatever value comes next."""
    char = yield from reader.look(1)
    if char == '"':
        yield from _string_as_written(reader, _ignore)
    elif char and char in "{[":
        yield from container(reader, _ignore)
    else:
        yield from scalar(reader)


def _ignore(text: str) -> None:
    pass
