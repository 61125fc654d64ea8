"""The formats in which models write tool calls: where one begins, and how it goes on from there."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ingine.engine.parsers import qwen3_coder
from ingine.engine.parsers.functions import Functions
from ingine.engine.parsers.json_calls import call_array, call_object, call_objects
from ingine.engine.parsers.json_text import container
from ingine.engine.parsers.reader import Parsing, Reader
from ingine.engine.parsers.writer import Writer

Branch = Callable[[Reader, Writer, Functions], Parsing[None]]
"""Reads calls from where one may begin. What it leaves recorded is no call, and becomes content."""

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
PYTHON_TAG = "<|python_tag|>"
_NAME = re.compile(r"[A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ToolFormat:
    behind: Mapping[str, Branch]
    """Marker -> what comes behind it."""
    at_start: Branch | None = None
    """Where a call needs no marker if the content begins with it."""
    has_short_ids: bool = False
    """Whether the chat template takes only ids of nine letters and digits."""
    markers: tuple[str, ...] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "markers", tuple(self.behind))

    def parse(self, reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
        """All of the content: what is no call stays as it is written, markers included."""
        if self.at_start:
            reader.record()
            yield from self.at_start(reader, writer, functions)
            writer.content(reader.recorded())
        if not self.markers:
            yield from reader.rest(writer.content)
            return
        while marker := (yield from reader.until(self.markers, writer.content)):
            reader.record()
            reader.take(len(marker))
            yield from self.behind[marker](reader, writer, functions)
            writer.content(reader.recorded())


def _tagged(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Behind `<tool_call>`: calls up to `</tool_call>`. Text between a call and that is content."""
    num_before = writer.num_calls
    yield from reader.skip_space()
    while (yield from reader.look(1)) == "{":
        is_complete = yield from call_object(reader, writer, functions, TOOL_CALL_END)
        if not is_complete:
            break
        yield from reader.skip_space()
    if writer.num_calls > num_before:
        writer.content(reader.recorded())
        yield from reader.until((TOOL_CALL_END, TOOL_CALL), writer.content)
        if (yield from reader.accept(TOOL_CALL_END)):
            writer.end_tag()


def _tagged_in_any_way(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Behind `<tool_call>`: JSON, or Qwen3-Coder's tags."""
    yield from reader.skip_space()
    if (yield from reader.look(1)) == "<":
        yield from _tagged_function(reader, writer, functions)
    else:
        yield from _tagged(reader, writer, functions)


def _tagged_function(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    yield from reader.skip_space()
    if (yield from reader.accept(qwen3_coder.FUNCTION)):
        yield from qwen3_coder.function(reader, writer, functions)


def _mistral(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Behind `[TOOL_CALLS]`: an array of objects, or a name and its arguments."""
    yield from reader.skip_space()
    if (yield from reader.starts_with(TOOL_CALLS)):
        return
    if (yield from reader.look(1)) == "[":
        yield from call_array(reader, writer, functions)
        return
    name = yield from reader.whole(_NAME)
    if (yield from reader.accept(CALL_ID)):
        yield from reader.whole(_NAME)
    yield from reader.accept(ARGS)
    yield from reader.skip_space()
    if name in functions and (yield from reader.look(1)) == "{":
        reader.forget()
        writer.begin_call(name)
        yield from container(reader, writer.arguments, TOOL_CALLS)


def _line(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """Behind a line's end: objects at the beginning of the next line."""
    writer.content(reader.recorded())
    reader.record()
    if (yield from reader.look(1)) == "{":
        yield from call_objects(reader, writer, functions)


def _unmarked(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """At the start: objects, or an array of them."""
    yield from reader.skip_space()
    if (yield from reader.starts_with(TOOL_CALLS)):
        return
    if (yield from reader.look(1)) == "[":
        yield from call_array(reader, writer, functions)
    else:
        yield from call_objects(reader, writer, functions)


def _required(reader: Reader, writer: Writer, functions: Functions) -> Parsing[None]:
    """An array of calls. Behind the first one nothing is content: if a text is cut off between two calls, it
    would be characters of the array."""
    yield from reader.skip_space()
    if (yield from reader.look(1)) == "[":
        yield from call_array(reader, writer, functions)
    if writer.num_calls:
        reader.forget()
        yield from reader.rest(lambda text: None)


TOOL_FORMATS: Mapping[str, ToolFormat] = {
    "hermes": ToolFormat({TOOL_CALL: _tagged}),
    "llama3_json": ToolFormat({PYTHON_TAG: call_objects, "\n": _line}, at_start=call_objects),
    "mistral": ToolFormat({TOOL_CALLS: _mistral}, has_short_ids=True),
    "qwen3_coder": ToolFormat({TOOL_CALL: _tagged_function, qwen3_coder.FUNCTION: qwen3_coder.function}),
    "generic": ToolFormat(
        {
            TOOL_CALL: _tagged_in_any_way,
            qwen3_coder.FUNCTION: qwen3_coder.function,
            TOOL_CALLS: _mistral,
            PYTHON_TAG: call_objects,
            "\n": _line,
        },
        at_start=_unmarked,
    ),
}
"""Names are vLLM's. `llama3_json` has calls without a marker where an object begins the content or a line.
`generic` understands all of the others, and a content that begins with an array of objects."""

REQUIRED = ToolFormat({}, at_start=_required)
"""What a grammar makes a model write that has to call: an array of objects and nothing else."""
