"""What a chat template makes a prompt of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ingine.engine.parsers.reasoning import REASONING_TAGS


@dataclass(frozen=True)
class Conversation:
    """Messages as OpenAI has them, and what else a chat template takes. All of it is JSON."""

    messages: Sequence[Mapping[str, Any]]
    """OpenAI's: {"role": ..., "content": text or text parts, "tool_calls": ..., "tool_call_id": ...}"""
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    add_generation_prompt: bool = True
    """End with what begins the assistant's turn."""
    continue_final_message: bool = False
    """End within the last message, which the model goes on with."""
    allow_special_tokens: bool = False
    """Control tokens in the texts of messages, tools and variables are control tokens, not text."""

    @classmethod
    def of(cls, messages: "Messages") -> "Conversation":
        """`messages` if that is a Conversation, and else one of these messages."""
        return messages if isinstance(messages, cls) else cls(messages)

    def fields(self) -> dict[str, Any]:
        """All fields by name, to make the same conversation of in another process."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def num_chars(self) -> int:
        """Characters of all texts, keys included."""
        return _num_chars([list(self.messages), list(self.tools or ()), dict(self.template_kwargs)])


Messages = Conversation | Sequence[Mapping[str, Any]]
"""A conversation, or its messages alone."""


def _num_chars(value: Any) -> int:
    total, left = 0, [value]
    while left:
        match left.pop():
            case str() as text:
                total += len(text)
            case dict() as mapping:
                left += mapping.keys()
                left += mapping.values()
            case list() | tuple() as values:
                left += values
    return total


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation, in which each control token was written by the chat template."""

    text: str
    """With a stand-in for the first character of each control token that is a message's text."""
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    """Stand-in -> the character that it stands for. It is in no text of the conversation."""

    @property
    def plain(self) -> str:
        """The text that the prompt stands for."""
        return self.text.translate(str.maketrans(dict(self.stand_ins))) if self.stand_ins else self.text


def open_reasoning(prompt: str, *, continued: str | None = None) -> str | None:
    """The name in `REASONING_TAGS` of the tags that a rendered prompt ends within; None if there are none.

    `continued`: the text of the final message, where the model goes on with that. Otherwise only an opening
    tag at the very end counts, which the template has written.
    """
    end = prompt.rstrip()
    for name, tags in REASONING_TAGS.items():
        if end.endswith(tags.opening):
            return name
        if continued is not None and continued.rfind(tags.opening) > continued.rfind(tags.closing):
            return name
    return None
