"""From a model's text to an assistant message."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ingine.engine.message_format import MessageFormat, NamedFunction, ReasoningTags, ToolChoice
from ingine.engine.parsers.functions import Functions
from ingine.engine.parsers.reader import Parsing, Reader
from ingine.engine.parsers.reasoning import parse_reasoning
from ingine.engine.parsers.tool_formats import REQUIRED, TOOL_FORMATS
from ingine.engine.parsers.writer import Writer
from ingine.message import Message, MessageAssembly, MessageDelta

_SHORT_ID_LENGTH = 9


class MessageParser:
    """One sequence's message. The deltas of all calls, put together, are `message()`.

    They are a function of the text: however it is split into pieces, they add up to the same message. To
    resume, feed the text that there is so far.
    """

    def __init__(
        self,
        *,
        tool_format: str | None = None,
        functions: Mapping[str, Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice = "auto",
        reasoning: ReasoningTags | None = None,
        starts_in_reasoning: bool = False,
        key: str = "",
    ):
        """tool_format: a name of `TOOL_FORMATS`; None: no tool calls, unless `tool_choice` forces one.
        functions: name -> JSON schema of the parameters. Other names are not called.
        tool_choice: `required` reads a JSON array of {name, parameters}; a named function's arguments are the
            whole text. A grammar is to see to it that the model writes that.
        starts_in_reasoning: the prompt ends with the opening tag.
        key: makes the ids of tool calls. The same key gives the same ids.
        """
        self._tool_format = TOOL_FORMATS[tool_format] if tool_format else None
        self._functions = Functions(functions or {})
        self._tool_choice = tool_choice
        self._reader = Reader()
        self._writer = Writer(
            _call_ids(key, short=bool(self._tool_format and self._tool_format.has_short_ids))
        )
        self._assembly = MessageAssembly()
        self._parsing = self._parse(reasoning, starts_in_reasoning)

    def feed(self, text: str) -> MessageDelta:
        """What is new with `text`, special tokens' text included, end-of-turn tokens not."""
        self._reader.push(text)
        next(self._parsing)
        return self._take_delta()

    def flush(self) -> MessageDelta:
        """What was held back, once there is no more text."""
        self._reader.end()
        next(self._parsing, None)
        self._writer.end()
        return self._take_delta()

    def message(self) -> Message:
        """All deltas so far, put together."""
        return self._assembly.message()

    def finish_reason(self, reason: str) -> str:
        """OpenAI's for the engine's: `tool_calls` where the model has called functions and stopped by itself;
        a named choice keeps `stop`."""
        is_free = not isinstance(self._tool_choice, NamedFunction)
        return "tool_calls" if reason == "stop" and self._writer.num_calls and is_free else reason

    def _take_delta(self) -> MessageDelta:
        delta = self._writer.take_delta()
        self._assembly.add(delta)
        return delta

    def _parse(self, reasoning: ReasoningTags | None, starts_in_reasoning: bool) -> Parsing[None]:
        reader, writer = self._reader, self._writer
        if reasoning:
            yield from parse_reasoning(reader, writer, reasoning, has_begun=starts_in_reasoning)
        if isinstance(self._tool_choice, NamedFunction):
            yield from _named_call(reader, writer, self._tool_choice.name)
        elif self._tool_choice == "required":
            yield from REQUIRED.parse(reader, writer, self._functions)
        elif self._tool_choice == "auto" and self._tool_format and self._functions:
            yield from self._tool_format.parse(reader, writer, self._functions)
        else:
            yield from reader.rest(writer.content)


def parser_of(format: MessageFormat, index: int = 0) -> MessageParser:
    """A parser for the output of one choice."""
    return MessageParser(
        tool_format=format.tool_format,
        functions=format.functions,
        tool_choice=format.tool_choice,
        reasoning=format.reasoning,
        starts_in_reasoning=format.starts_in_reasoning,
        key=f"{format.key}/{index}",
    )


def _named_call(reader: Reader, writer: Writer, name: str) -> Parsing[None]:
    """All the text as the arguments of that function."""
    yield from reader.skip_space()
    if (yield from reader.look(1)):
        writer.begin_call(name)
        yield from reader.rest(writer.arguments)


def _call_ids(key: str, *, short: bool) -> Callable[[int], str]:
    """Ids by a call's index: the same for the same key, so a job that is resumed has the same."""

    def call_id(index: int) -> str:
        digest = hashlib.blake2b(f"{key}/{index}".encode(errors="replace"), digest_size=12).hexdigest()
        return digest[:_SHORT_ID_LENGTH] if short else f"call_{digest}"

    return call_id


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Functions by name, from OpenAI's `tools`: [{"type": "function", "function": {"name": ...}}]."""
    found = {}
    for tool in tools:
        function = tool["function"]
        found[function["name"]] = function.get("parameters") or {}
    return found
