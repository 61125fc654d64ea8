"""Qwen3-Coder's calls: <function=name> with a <parameter=key> for each argument, and values that are text.

The arguments' JSON is made from that. The schema says which values are strings; these are streamed. A value
of another type is checked when it is complete: it becomes a string unless it is JSON of that type.
"""

import json
import re
from typing import NoReturn

from ingine.engine.parsers.functions import Functions, type_of
from ingine.engine.parsers.reader import Parsing, Reader
from ingine.engine.parsers.writer import Writer

FUNCTION = "<function="
_FUNCTION_END, _CALL_END = "</function>", "</tool_call>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NEXT = (_PARAMETER, _FUNCTION_END, _CALL_END, FUNCTION, "<tool_call>")
"""What may follow a parameter. All but the first end the function, also where its own end is missing."""
_VALUE_ENDS = ("\n" + _PARAMETER_END, _PARAMETER_END)
_NAME = re.compile(r"[^<>\r\n]*")

_PYTHON_CONSTANTS = {"True": "true", "False": "false", "None": "null"}


def function(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Read a call, behind `<function=`. One that is cut off has arguments that are cut off."""
    name = (yield from reader.whole(_NAME)).strip()
    if name not in functions or not (yield from reader.accept(">")):
        return
    reader.forget()
    writer.begin_call(name)
    writer.arguments("{")
    yield from _parameters(reader, writer, functions, name)
    reader.record()
    yield from reader.skip_space()
    if (yield from reader.accept(_CALL_END)):
        reader.forget()


def _parameters(reader: Reader, writer: Writer, functions: Functions, name: str) -> Parsing[None]:
    """To the end of the function, or of the text. What else there is between the tags is content."""
    separator = ""
    while True:
        marker = yield from reader.until(_NEXT, writer.content)
        if marker != _PARAMETER:
            break
        reader.record()
        reader.take(len(_PARAMETER))
        key = (yield from reader.whole(_NAME)).strip()
        if not (yield from reader.accept(">")):
            writer.content(reader.recorded())
            continue
        reader.forget()
        writer.end_tag()
        writer.arguments(f"{separator}{_quoted(key)}: ")
        separator = ", "
        types = functions.types_of(name, key)
        read = _read_text if types == {"string"} else _read_value
        if not (yield from read(reader, writer, types)):
            return
    if marker:
        writer.arguments("}")
    yield from reader.accept(_FUNCTION_END)


def _read_text(reader: Reader, writer: Writer, types: set[str]) -> Parsing[bool]:
    """Stream a string. Returns whether it has ended; only then it gets its closing quote."""
    yield from reader.accept("\n")
    writer.arguments('"')
    end = yield from reader.until(_VALUE_ENDS, lambda text: writer.arguments(_quoted(text)[1:-1]))
    if end:
        reader.take(len(end))
        writer.arguments('"')
    return bool(end)


def _read_value(reader: Reader, writer: Writer, types: set[str]) -> Parsing[bool]:
    """Write a value when it is complete. One that is cut off is written as it is."""
    yield from reader.accept("\n")
    pieces: list[str] = []
    end = yield from reader.until(_VALUE_ENDS, pieces.append)
    text = "".join(pieces)
    reader.take(len(end))
    writer.arguments(as_json(text, types) if end else text)
    return bool(end)


def as_json(text: str, types: set[str]) -> str:
    """The value as JSON text: as written if it is JSON of one of `types`, or null; else it is a string."""
    written = text.strip()
    written = _PYTHON_CONSTANTS.get(written, written)
    try:
        value = json.loads(written, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(text)
    kind = type_of(value)
    fits = not types or kind in types or kind == "null" or (kind == "integer" and "number" in types)
    return written if fits and kind != "string" else _quoted(text)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
