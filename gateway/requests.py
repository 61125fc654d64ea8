"""What every request passes: its id, the limit of requests at a time, and the check of the Host header."""

import re
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse

from ingine.gateway.errors import Fault, Refused, fault_of, retry_after

LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
BUSY_RETRY_S = 1.0
ID_HEADERS = ("x-request-id", "openai-request-id")


def error_response(fault: Fault) -> JSONResponse:
    return JSONResponse(fault.body(), fault.status, fault.headers)


class Requests:
    """An ASGI middleware around the whole application.

    The id of a request is that of its job, which its endpoint sets as `request.state.request_id`; a request
    without a job has an id of its own.
    """

    def __init__(self, app: Any, *, max_requests: int, local_only: bool):
        """local_only: refuse requests that name another host, as a web page does that had its own name
        resolve to this machine. Keys make that check superfluous."""
        self._app, self._max_requests, self._local_only = app, max_requests, local_only
        self.num_requests = 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = f"req_{uuid.uuid4().hex}"

        async def send_with_id(message: dict) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in ID_HEADERS:
                    headers[name] = state["request_id"]
            await send(message)

        app = self._app
        if (refusal := self._refusal(scope)) is not None:
            app = error_response(fault_of(refusal))
        self.num_requests += 1
        try:
            await app(scope, receive, send_with_id)
        finally:
            self.num_requests -= 1

    def _refusal(self, scope: dict) -> Refused | None:
        if self._local_only and not LOCAL_HOST.fullmatch(Headers(scope=scope).get("host", "")):
            return Refused(
                403, "invalid_host", "without API keys this gateway serves only http://localhost and loopback"
            )
        if self.num_requests >= self._max_requests and scope["path"] != "/health":
            headers = retry_after(BUSY_RETRY_S)
            return Refused(503, "overloaded", "this gateway has too many requests", headers=headers)
        return None
