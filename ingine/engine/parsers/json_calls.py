"""Tool calls that are JSON: {"name": ..., "arguments": {...}}, alone or several."""

from ingine.engine.parsers.functions import Functions
from ingine.engine.parsers.json_text import Emit, container, scalar, skip_value, string, text
from ingine.engine.parsers.reader import Parsing, Reader
from ingine.engine.parsers.writer import Writer

_ARGUMENTS = ("arguments", "parameters")
_KEYS = ("name", "type", "id", *_ARGUMENTS)
"""An object with another one before its call is known is none."""


def call_object(reader: Reader, writer: Writer, functions: Functions, closing: str = "") -> Parsing[bool]:
    """Read the object that comes next. Returns whether it is a call, and complete.

    A call begins as soon as the name of a known function and the first character of its arguments have come;
    an object that ends without arguments has `{}`. Until then the text is recorded. From then on what follows
    is arguments, as written, and nothing is taken back: behind them only text that does not belong there is
    recorded. Arguments in a string (JSON in JSON) are decoded.
    """
    call = _Call(reader, writer, functions, closing)
    reader.take(1)
    while True:
        yield from reader.skip_space()
        key = yield from text(reader)
        if key is None:
            break
        yield from reader.skip_space()
        if not (yield from reader.accept(":")):
            return False
        yield from reader.skip_space()
        if not (yield from call.read(key)):
            return False
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    if not (yield from reader.accept("}")):
        return False
    return call.end()


class _Call:
    """A call as far as it is known."""

    def __init__(self, reader: Reader, writer: Writer, functions: Functions, closing: str):
        self._reader = reader
        self._writer = writer
        self._functions = functions
        self._closing = closing
        self._name: str | None = None
        self._early: list[str] | None = None
        """Arguments that came before the name."""
        self._has_begun = False

    def read(self, key: str) -> Parsing[bool]:
        """Read the value of a key. Returns whether this may still be a call, or is one."""
        if key == "name" and self._name is None:
            return (yield from self._read_name())
        if key in _ARGUMENTS and not self._has_begun and self._early is None:
            return (yield from self._read_arguments())
        if key not in _KEYS and not self._has_begun:
            return False
        yield from skip_value(self._reader)
        return True

    def _read_name(self) -> Parsing[bool]:
        self._name = yield from text(self._reader)
        if self._name not in self._functions:
            return False
        if self._early is not None:
            self._begin()
            self._writer.arguments("".join(self._early))
            self._reader.record()
        return True

    def _read_arguments(self) -> Parsing[bool]:
        char = yield from self._reader.look(1)
        if char not in ("{", '"') and (yield from scalar(self._reader)) != "null":
            return False
        emit = self._begin_arguments()
        if char == "{":
            yield from container(self._reader, emit, self._closing)
        elif char == '"':
            yield from string(self._reader, emit)
        else:
            emit("{}")
        if self._has_begun:
            self._reader.record()
        return True

    def _begin_arguments(self) -> Emit:
        if self._name is None:
            self._early = []
            return self._early.append
        self._begin()
        return self._writer.arguments

    def _begin(self) -> None:
        self._reader.forget()
        self._writer.begin_call(self._name)
        self._has_begun = True

    def end(self) -> bool:
        """The object has ended."""
        if self._name is None:
            return False
        if not self._has_begun:
            self._begin()
            self._writer.arguments("{}")
        self._reader.record()
        return True


def call_objects(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Calls one after another, with white space or a semicolon between them."""
    while True:
        yield from reader.skip_space()
        if (yield from reader.look(1)) != "{":
            return
        if not (yield from call_object(reader, writer, functions)):
            return
        yield from reader.skip_space()
        yield from reader.accept(";")


def call_array(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Calls in the array that comes next."""
    reader.take(1)
    while True:
        yield from reader.skip_space()
        if (yield from reader.look(1)) != "{":
            return
        if not (yield from call_object(reader, writer, functions)):
            return
        yield from reader.skip_space()
        if (yield from reader.accept("]")):
            reader.forget()
            return
        if not (yield from reader.accept(",")):
            return
