"""How the output of a request is read as an assistant message."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


class ReasoningTags(NamedTuple):
    """The tags between which a model writes its reasoning."""

    opening: str
    closing: str


class NamedFunction(NamedTuple):
    """A tool choice: this function has to be called."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | NamedFunction


@dataclass(frozen=True, slots=True)
class MessageFormat:
    tool_format: str | None = None
    """A name of `TOOL_FORMATS`. None: no tool calls, unless `tool_choice` forces one."""
    functions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name -> JSON schema of the parameters. Other names are not called."""
    tool_choice: ToolChoice = "auto"
    reasoning: ReasoningTags | None = None
    starts_in_reasoning: bool = False
    """The prompt ends within the reasoning."""
    key: str = ""
    """The name of the request. The id of a tool call is a function of it, of the choice and of the call's
    index.
    """

    def to_map(self) -> dict[str, Any]:
        """The fields as msgpack takes them."""
        choice = self.tool_choice
        return {
            "tool_format": self.tool_format,
            "functions": dict(self.functions),
            "tool_choice": {"name": choice.name} if isinstance(choice, NamedFunction) else choice,
            "reasoning": self.reasoning,
            "starts_in_reasoning": self.starts_in_reasoning,
            "key": self.key,
        }

    @classmethod
    def from_map(cls, fields: Mapping[str, Any]) -> "MessageFormat":
        """The inverse of `to_map`."""
        choice, tags = fields["tool_choice"], fields["reasoning"]
        read = {
            "tool_choice": NamedFunction(**choice) if isinstance(choice, Mapping) else choice,
            "reasoning": None if tags is None else ReasoningTags(*tags),
        }
        return cls(**fields | read)
