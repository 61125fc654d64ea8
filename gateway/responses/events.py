"""The events of a response, and the response itself: both made from the events of its job's log alone.

The number of an event is PER_ENTRY times the position of its log entry, plus its place among the events that
the entry becomes. So a number means the same to every gateway, and numbers grow, with gaps.
"""

from collections.abc import Iterator
from typing import Any

from ingine.contract.events import Event, TerminalEvent, TokensEvent
from ingine.contract.record import JobStatus
from ingine.gateway.responses.items import Item, ItemKind
from ingine.producer.choices import last_chunks

PER_ENTRY = 256
"""Events of one position: below half of it those of its tokens, above those of the job's end."""
FINAL_EVENTS = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.failed",  # OpenAI has no event of its own
}


class ResponseLog:
    """A response as it grows. Feed it all events of the log, from the first; it returns OpenAI's events."""

    def __init__(self, fields: dict[str, Any]):
        """fields: of the response, without those that its end decides."""
        self._fields = fields
        self._items: list[Item] = []
        self._calls: dict[int, Item] = {}
        self._is_parsed = False
        self._number = 0
        self.status = "in_progress"
        self._end: TerminalEvent | None = None

    def begin(self) -> list[dict[str, Any]]:
        """Return the events before the first tokens."""
        self._number = 0
        return [
            self._numbered({"type": kind, "response": self.response()})
            for kind in ("response.created", "response.in_progress")
        ]

    def add(self, event: Event) -> list[dict[str, Any]]:
        """Return the events that an event of the log becomes."""
        is_end = isinstance(event, TerminalEvent)
        self._number = PER_ENTRY * event.position + (PER_ENTRY // 2 if is_end else 0)
        made = self._of_end(event) if isinstance(event, TerminalEvent) else self._of_tokens(event)
        return [self._numbered(fields) for fields in made]

    def response(self) -> dict[str, Any]:
        """Return the response. Its output is empty while it is in progress."""
        end = self._end
        error = incomplete = usage = None
        if end is not None:
            usage = _usage(end.usage) if end.usage else None
            if self.status == "failed":
                error = {"code": (end.error or {}).get("code"), "message": (end.error or {}).get("message")}
            if self.status == "incomplete":
                incomplete = {"reason": "max_output_tokens"}
        return self._fields | {
            "status": self.status,
            "error": error,
            "incomplete_details": incomplete,
            "output": [item.fields() for item in self._items] if end is not None else [],
            "usage": usage,
        }

    def _numbered(self, fields: dict[str, Any]) -> dict[str, Any]:
        fields = {"type": fields["type"], "sequence_number": self._number} | fields
        self._number += 1
        return fields

    def _of_tokens(self, event: TokensEvent) -> Iterator[dict[str, Any]]:
        self._is_parsed = self._is_parsed or event.delta is not None
        yield from self._of_delta(event.delta if event.delta is not None else {"content": event.text})

    def _of_end(self, end: TerminalEvent) -> Iterator[dict[str, Any]]:
        for chunk in last_chunks(end, is_parsed=self._is_parsed):
            yield from self._of_delta(chunk.delta)
        self.status = _status(end)
        if not self._items and self.status in ("completed", "incomplete"):
            yield from self._open(ItemKind.MESSAGE)
        for item in self._items:
            yield from item.close("completed" if self.status == "completed" else "incomplete")
        self._end = end
        yield {"type": FINAL_EVENTS[self.status], "response": self.response()}

    def _of_delta(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for name, kind in (("reasoning", ItemKind.REASONING), ("content", ItemKind.MESSAGE)):
            if delta.get(name):
                if not self._items or self._items[-1].kind is not kind:
                    yield from self._open(kind)
                yield self._items[-1].add(delta[name])
        for call in delta.get("tool_calls", ()):
            if call["index"] not in self._calls:
                yield from self._open(ItemKind.CALL, call)
                self._calls[call["index"]] = self._items[-1]
            if call["function"]["arguments"]:
                yield self._calls[call["index"]].add(call["function"]["arguments"])

    def _open(self, kind: ItemKind, call: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        if self._items and {self._items[-1].kind, kind} != {
            ItemKind.CALL
        }:  # calls may go on beside each other
            yield from self._items[-1].close("completed")
        item = Item(kind, self._fields["id"], len(self._items), call)
        self._items.append(item)
        yield from item.open()


def _status(end: TerminalEvent) -> str:
    if end.status is JobStatus.FINISHED:
        return "incomplete" if end.finish_reason == "length" else "completed"
    return "cancelled" if end.status is JobStatus.CANCELLED else "failed"


def _usage(usage: dict[str, int]) -> dict[str, Any]:
    num_input, num_output = (usage.get(f"num_{side}_tokens", 0) for side in ("prompt", "output"))
    return {
        "input_tokens": num_input,
        "input_tokens_details": {"cached_tokens": usage.get("num_cached_tokens", 0)},
        "output_tokens": num_output,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": num_input + num_output,
    }
