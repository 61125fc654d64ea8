"""What parsers write: the deltas of a message."""

from collections.abc import Callable

from ingine.message import MessageDelta, ToolCallDelta

_SPACE = " \t\r\n"


class Writer:
    """Collects what is new of a message until it is asked for.

    White space beside a tag belongs to the tag. Where content surrounds tool calls, the space before them
    stays between its parts.
    """

    def __init__(self, call_id: Callable[[int], str]):
        """`call_id`: the id of the tool call with that index."""
        self._call_id = call_id
        self._content = _Prose()
        self._reasoning = _Prose()
        self._calls: dict[int, tuple[ToolCallDelta, list[str]]] = {}
        self.num_calls = 0

    def content(self, text: str) -> None:
        self._content.write(text)

    def reasoning(self, text: str) -> None:
        self._reasoning.write(text)

    def begin_reasoning(self) -> None:
        self._reasoning.behind_tag = True

    def end_reasoning(self) -> None:
        """Its closing tag has come."""
        self._reasoning.behind_tag = self._content.behind_tag = True

    def begin_call(self, name: str) -> None:
        delta = ToolCallDelta(self.num_calls, self._call_id(self.num_calls), name)
        self._calls[self.num_calls] = delta, []
        self.num_calls += 1
        self.end_tag()

    def arguments(self, text: str) -> None:
        """Go on with the arguments of the last call."""
        index = self.num_calls - 1
        if text and index not in self._calls:
            self._calls[index] = ToolCallDelta(index), []
        if text:
            self._calls[index][1].append(text)

    def end_tag(self) -> None:
        """A tag that is no content has come."""
        self._content.behind_tag = True

    def end(self) -> None:
        """No more comes: space at the end of content or reasoning is part of it."""
        self._content.end()
        self._reasoning.end()

    def take_delta(self) -> MessageDelta:
        """What is new since the last call."""
        calls = []
        for delta, pieces in self._calls.values():
            delta.arguments = "".join(pieces)
            calls.append(delta)
        self._calls = {}
        return MessageDelta(self._content.take(), self._reasoning.take(), calls)


class _Prose:
    """Text of which the space at its end is held back, since a tag may follow."""

    def __init__(self):
        self._new: list[str] = []
        self._space: list[str] = []
        self._is_empty = True
        self.behind_tag = False
        """A tag is the last that has come, but for space."""

    def write(self, text: str) -> None:
        if self.behind_tag:
            text = text.lstrip(_SPACE)
        if not text:
            return
        if body := text.rstrip(_SPACE):
            if not (self.behind_tag and self._is_empty):
                self._new += self._space
            self._new.append(body)
            self._space = []
            self._is_empty = self.behind_tag = False
        if len(body) < len(text):
            self._space.append(text[len(body) :])

    def end(self) -> None:
        if not self.behind_tag:
            self._new += self._space
        self._space = []

    def take(self) -> str:
        taken, self._new = "".join(self._new), []
        return taken
