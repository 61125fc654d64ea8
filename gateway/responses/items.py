"""The output items of a response: a message, reasoning, and calls of functions, and the events of each."""

from collections.abc import Iterator
from enum import Enum
from typing import Any


class ItemKind(Enum):
    """An item's kind: its prefix of ids, and the names of its events."""

    MESSAGE = ("msg", "response.output_text")
    REASONING = ("rs", "response.reasoning_text")
    CALL = ("fc", "response.function_call_arguments")


class Item:
    """An item that grows. Its methods return events without their numbers."""

    def __init__(self, kind: ItemKind, response_id: str, index: int, call: dict[str, Any] | None = None):
        """index: its place in the output. call: the first delta of a call, with its id and name."""
        self.kind = kind
        prefix, self._event_name = kind.value
        self._id = f"{prefix}_{response_id.removeprefix('resp_')}{index:02x}"
        self._index = index
        self._call = call
        self._texts: list[str] = []
        self._status = "in_progress"

    def fields(self) -> dict[str, Any]:
        text = "".join(self._texts)
        common = {"id": self._id, "status": self._status}
        if self._call is not None:
            name = self._call["function"]["name"]
            call = {"type": "function_call", "call_id": self._call["id"], "name": name, "arguments": text}
            return common | call
        content = [] if self._status == "in_progress" else [self._part(text)]
        if self.kind is ItemKind.REASONING:
            return common | {"type": "reasoning", "summary": [], "content": content}
        return common | {"type": "message", "role": "assistant", "content": content}

    def open(self) -> Iterator[dict[str, Any]]:
        place = {"output_index": self._index}
        yield {"type": "response.output_item.added", **place, "item": self.fields()}
        if self._call is None:
            yield {"type": "response.content_part.added", **self._place, "part": self._part("")}

    def add(self, text: str) -> dict[str, Any]:
        self._texts.append(text)
        logprobs = {"logprobs": []} if self.kind is ItemKind.MESSAGE else {}
        return {"type": f"{self._event_name}.delta", **self._place, "delta": text} | logprobs

    def close(self, status: str) -> Iterator[dict[str, Any]]:
        """Return the item's last events; none if it is closed already."""
        if self._status != "in_progress":
            return
        self._status = status
        text = "".join(self._texts)
        done = {"type": f"{self._event_name}.done", **self._place}
        if self._call is not None:
            yield done | {"name": self._call["function"]["name"], "arguments": text}
        else:
            logprobs = {"logprobs": []} if self.kind is ItemKind.MESSAGE else {}
            yield done | {"text": text} | logprobs
            yield {"type": "response.content_part.done", **self._place, "part": self._part(text)}
        yield {"type": "response.output_item.done", "output_index": self._index, "item": self.fields()}

    @property
    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._id, "output_index": self._index}
        return place if self._call is not None else place | {"content_index": 0}

    def _part(self, text: str) -> dict[str, Any]:
        if self.kind is ItemKind.REASONING:
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
