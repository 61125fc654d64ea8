"""An assistant message, and the deltas in which it is streamed. Both have the shape of OpenAI's API."""

from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class ToolCallDelta:
    """What is new of one tool call. `id` and `name` come once, in its first delta."""

    index: int
    """Position among the message's tool calls, from 0."""
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    """A piece of the arguments' JSON text."""

    def to_openai(self) -> dict[str, Any]:
        """The entry of `delta.tool_calls`, without what has not changed."""
        function = {} if self.name is None else {"name": self.name}
        function["arguments"] = self.arguments
        if self.id is None:
            return {"index": self.index, "function": function}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}

    @classmethod
    def from_openai(cls, entry: dict[str, Any]) -> Self:
        """The inverse of `to_openai`. Raises KeyError or TypeError for another shape."""
        function = entry["function"]
        return cls(entry["index"], entry.get("id"), function.get("name"), function.get("arguments", ""))


@dataclass(slots=True)
class MessageDelta:
    """What is new of a message. Empty strings and an empty list mean that nothing is."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    """At most one for each index."""

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls)

    def followed_by(self, later: "MessageDelta") -> "MessageDelta":
        """Merge this delta with the message's next one, as if both had come at once."""
        calls = {call.index: call for call in self.tool_calls}
        for call in later.tool_calls:
            if (earlier := calls.get(call.index)) is not None:
                call = ToolCallDelta(call.index, earlier.id, earlier.name, earlier.arguments + call.arguments)
            calls[call.index] = call
        return MessageDelta(
            self.content + later.content, self.reasoning + later.reasoning, list(calls.values())
        )

    def to_openai(self) -> dict[str, Any]:
        """The `delta` of a chat completion chunk: the fields that have changed, {} if none has."""
        fields: dict[str, Any] = {}
        if self.content:
            fields["content"] = self.content
        if self.reasoning:
            fields["reasoning"] = self.reasoning
        if self.tool_calls:
            fields["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        return fields

    @classmethod
    def from_openai(cls, fields: dict[str, Any]) -> Self:
        """The inverse of `to_openai`. Raises KeyError or TypeError for another shape."""
        calls = [ToolCallDelta.from_openai(entry) for entry in fields.get("tool_calls", ())]
        return cls(fields.get("content", ""), fields.get("reasoning", ""), calls)


def joined(delta: MessageDelta | None, later: MessageDelta | None) -> MessageDelta | None:
    """Merge two successive deltas, each of which is None if nothing is new."""
    return delta.followed_by(later) if delta and later else delta or later


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str
    """JSON text as the model wrote it; not valid JSON where the model's is not, or where it was cut off."""

    def to_openai(self) -> dict[str, Any]:
        """The entry of a message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    @classmethod
    def from_openai(cls, entry: dict[str, Any]) -> Self:
        """The inverse of `to_openai`, which ignores unknown fields."""
        function = entry["function"]
        return cls(entry["id"], function["name"], function["arguments"])


@dataclass(slots=True)
class Message:
    content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def to_openai(self) -> dict[str, Any]:
        """The message as OpenAI's clients read it. `content` is None in a message of tool calls alone."""
        fields: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            fields["reasoning"] = self.reasoning
        if self.tool_calls:
            fields["content"] = self.content or None
            fields["tool_calls"] = [call.to_openai() for call in self.tool_calls]
        return fields


class MessageAssembly:
    """Adds deltas up, in time proportional to their text."""

    def __init__(self):
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[str, str, list[str]]] = []

    @property
    def num_calls(self) -> int:
        return len(self._calls)

    def add(self, delta: MessageDelta) -> None:
        """Raises ValueError for a call that begins out of turn, or without its id and name."""
        self._content.append(delta.content)
        self._reasoning.append(delta.reasoning)
        for call in delta.tool_calls:
            self._add_call(call)

    def _add_call(self, call: ToolCallDelta) -> None:
        is_new = call.index == len(self._calls)
        if is_new and call.id is not None and call.name is not None:
            self._calls.append((call.id, call.name, []))
        elif is_new or call.index > len(self._calls) or call.id is not None or call.name is not None:
            raise ValueError(f"a delta of tool call {call.index} out of turn")
        self._calls[call.index][2].append(call.arguments)

    def message(self) -> Message:
        calls = [ToolCall(id, name, "".join(pieces)) for id, name, pieces in self._calls]
        return Message("".join(self._content), "".join(self._reasoning), calls)
