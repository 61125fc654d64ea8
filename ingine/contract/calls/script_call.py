"""A call of a Lua script, as a value."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Reply = TypeVar("Reply")


@dataclass(frozen=True, slots=True)
class ScriptCall(Generic[Reply]):
    """What to send to the server for one call of a script, and how to read its reply."""

    source: str
    """The script's text, from `read_script`."""
    keys: Sequence[str | bytes]
    args: Sequence[str | int | bytes]
    read_reply: Callable[[Any], Reply]
    """Decodes the server's reply. It is not called for an error."""
