"""The bytes of server-sent events.

A comment that ends an event makes a client that is in wide use parse an empty event once the stream has had
an `id:` line. PING therefore is a line of the next event.
"""

from typing import Any

from ingine.gateway.encoding import encode_json

PING = b": ping\n"
DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would collect events
}


def event(fields: dict[str, Any], *, position: str | None = None, kind: str | None = None) -> bytes:
    """Return one event. position: for its `id:` line. kind: for its `event:` line."""
    lines = f"id: {position}\n" if position is not None else ""
    if kind is not None:
        lines += f"event: {kind}\n"
    return lines.encode() + b"data: " + encode_json(fields) + b"\n\n"
