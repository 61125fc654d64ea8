"""Prints assistant messages: content on standard output, calls of functions as lines of JSON behind it, and
reasoning on standard error, so that a pipe gets none."""

import json
from collections.abc import Mapping
from typing import Any

from ingine.message import ToolCall
from ingine.terminal import echo


class MessagePrinter:
    """Prints a message as its deltas come. Each part begins on a line of its own."""

    def __init__(self):
        self._open: bool | None = None
        """The stream with an unfinished line: True is standard error. None: there is no such line."""

    def add(self, delta: Mapping[str, Any]) -> None:
        """Print the content and the reasoning of a delta as OpenAI has it."""
        self._print(delta.get("reasoning"), err=True)
        self._print(delta.get("content"), err=False)

    def end_line(self) -> None:
        if self._open is not None:
            echo(err=self._open)
            self._open = None

    def _print(self, text: str | None, *, err: bool) -> None:
        if not text:
            return
        if self._open is not err:
            self.end_line()
        echo(text, err=err, end="", keep_lines=True)
        self._open = None if text.endswith("\n") else err


def print_tool_calls(message: Mapping[str, Any]) -> None:
    """Print a line of JSON for each tool call: its known fields, since the others need not be JSON."""
    for call in message.get("tool_calls") or ():
        echo(json.dumps(ToolCall.from_openai(call).to_openai(), ensure_ascii=False))


def print_message(message: Mapping[str, Any]) -> None:
    """Print a whole message as `MessagePrinter` prints its deltas, and then its tool calls."""
    printer = MessagePrinter()
    printer.add({name: message.get(name) for name in ("reasoning", "content")})
    printer.end_line()
    print_tool_calls(message)


def print_choice(index: int, message: Mapping[str, Any]) -> None:
    """Print one of several messages, under a line with its index. Content that is empty has a line too."""
    echo(f"[{index}]")
    if message.get("reasoning"):
        echo(message["reasoning"], err=True, keep_lines=True)
    if message["content"] is not None:
        echo(message["content"], keep_lines=True)
    print_tool_calls(message)
