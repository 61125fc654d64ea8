"""Read a request's body: JSON, within limits of bytes and of time."""

import asyncio
import json
from typing import Any

from starlette.requests import Request

from ingine.gateway.errors import Refused

CLOSE = {"connection": "close"}
"""After a refusal the rest of the body is not read, so the connection cannot be used again."""


async def read_object(request: Request, *, max_bytes: int, timeout_s: float) -> dict[str, Any]:
    """Return the body as an object. Raises Refused, and ClientDisconnect if the client is gone.

    Only `application/json` is accepted: a browser does not let a page send that to another site unasked.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, "unsupported_media_type", "send JSON, with Content-Type: application/json")
    raw = await _read(request, max_bytes, timeout_s)
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, "invalid_json", f"the body is not JSON: {reason}") from None
    if not isinstance(body, dict):
        raise Refused(400, "invalid_json", f"the body is not an object, but a {type(body).__name__}")
    return body


async def _read(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    raw = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                raw += part
                if len(raw) > max_bytes:
                    raise _too_large(max_bytes)
    except TimeoutError:
        message = f"the body has not arrived within {timeout_s:g} s"
        raise Refused(408, "request_timeout", message, headers=CLOSE) from None
    return bytes(raw)


def _too_large(max_bytes: int) -> Refused:
    return Refused(413, "request_too_large", f"the body has more than {max_bytes} bytes", headers=CLOSE)
