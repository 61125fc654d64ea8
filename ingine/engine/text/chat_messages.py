"""Brings OpenAI's messages into the form that a chat template reads.

OpenAI has the arguments of a tool call as JSON text, and content as text or a list of parts. Templates differ
in what they read. What a template reads is found by rendering a small conversation once.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from ingine.engine.text.chat_template import ChatTemplate

_SOME_TIME = datetime(2024, 1, 1, tzinfo=UTC)
_TEXT = "text of a part"
_ARGUMENTS = {"name of an argument": 1}
_CALL_ID = "abcdefghi"
_FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}


class ChatMessages:
    def __init__(self, template: ChatTemplate):
        self._template = template

    def prepare(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages with parts joined unless the template reads parts, and with arguments as objects unless it
        writes them as text. Arguments that are no JSON object stay text. A message of tool calls alone has
        empty content if the template fails without.
        """
        return [self._prepare(message) for message in messages]

    def _prepare(self, message: Mapping[str, Any]) -> dict[str, Any]:
        prepared = dict(message)
        content = prepared.get("content")
        if isinstance(content, list | tuple) and not self.reads_parts:
            prepared["content"] = "".join(part["text"] for part in content)
        if prepared.get("tool_calls"):
            if content is None and self.requires_content:
                prepared["content"] = ""
            prepared["tool_calls"] = [self._prepare_call(call) for call in prepared["tool_calls"]]
        return prepared

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not self.writes_arguments_as_text:
            function["arguments"] = _object(arguments)
        elif isinstance(arguments, Mapping) and self.writes_arguments_as_text:
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": function}

    @cached_property
    def reads_parts(self) -> bool:
        """Whether the template writes text parts as it writes their text."""
        as_parts, as_text = (
            self._try([{"role": "user", "content": content}])
            for content in ([{"type": "text", "text": _TEXT}], _TEXT)
        )
        return as_parts is not None and as_parts == as_text and _TEXT in as_parts

    @cached_property
    def writes_arguments_as_text(self) -> bool:
        """Whether the template writes the arguments of a tool call as they are, rather than as JSON."""
        as_object, as_text = (
            self._try(_conversation_with_call(arguments))
            for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS))
        )
        return as_text is not None and (as_object is None or str(_ARGUMENTS) in as_object)

    @cached_property
    def requires_content(self) -> bool:
        """Whether the template fails at a message of tool calls alone, and not if its content is empty."""
        arguments = json.dumps(_ARGUMENTS) if self.writes_arguments_as_text else _ARGUMENTS
        question, call, answer = _conversation_with_call(arguments)
        if self._try([question, call, answer]) is None:
            return False
        del call["content"]
        return self._try([question, call, answer]) is None

    def _try(self, messages: list[dict[str, Any]]) -> str | None:
        tools = [{"type": "function", "function": _FUNCTION}]
        try:
            return self._template.render(messages, _SOME_TIME, tools=tools)
        except MemoryError:
            raise
        except Exception:  # a template may raise anything
            return None


def _object(text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _conversation_with_call(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": _CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": _CALL_ID, "name": "f", "content": "b"},
    ]
