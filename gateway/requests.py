"""What every request passes: its id, the limit of requests at a time, the check of its Host, and metrics."""

import asyncio
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from ingine.gateway.encoding import Json
from ingine.gateway.errors import Fault, Refused, fault_of, retry_after
from ingine.gateway.metrics import OTHER, Metrics

LOCAL_HOST = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
BUSY_RETRY_S = 1.0
METHODS = ("DELETE", "GET", "HEAD", "POST")
ID_HEADERS = ("x-request-id", "openai-request-id")


def error_response(fault: Fault) -> Json:
    return Json(fault.body(), fault.status, fault.headers)


class Requests:
    """An ASGI middleware around the whole application.

    The id of a request is that of its job, which its endpoint sets as `request.state.request_id`; a request
    without a job has an id of its own.
    """

    def __init__(self, app: Any, *, metrics: Metrics, paths: dict, max_requests: int, local_only: bool):
        """paths: endpoint -> its path, as metrics name it. local_only: refuse requests that name another
        host, as a web page does that had its own name resolve to this machine. Keys make that check
        superfluous."""
        self._app, self._metrics, self._paths = app, metrics, paths
        self._max_requests, self._local_only = max_requests, local_only
        self._num_requests = 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = f"req_{uuid.uuid4().hex}"
        app = self._app
        if (refusal := self._refusal(scope)) is not None:
            app = error_response(fault_of(refusal))
        answer = _Answer(scope, send)
        self._num_requests += 1
        self._metrics.in_flight.inc()
        try:
            await app(scope, receive, answer.send)
        except asyncio.CancelledError:  # the gateway shuts down
            if not answer.has_begun:
                error = Refused(503, "shutting_down", "this gateway stops", headers=retry_after(BUSY_RETRY_S))
                await error_response(fault_of(error))(scope, receive, answer.send)
        finally:
            self._num_requests -= 1
            self._metrics.in_flight.dec()
            self._observe(scope, answer)

    def _refusal(self, scope: dict) -> Refused | None:
        if self._local_only and not LOCAL_HOST.fullmatch(Headers(scope=scope).get("host", "")):
            return Refused(
                403, "invalid_host", "without API keys this gateway serves only http://localhost and loopback"
            )
        if self._num_requests >= self._max_requests and scope["path"] != "/health":
            headers = retry_after(BUSY_RETRY_S)
            return Refused(503, "overloaded", "this gateway has too many requests", headers=headers)
        return None

    def _observe(self, scope: dict, answer: "_Answer") -> None:
        path = self._paths.get(scope.get("endpoint"), OTHER)
        method = scope["method"] if path != OTHER and scope["method"] in METHODS else OTHER
        self._metrics.requests.labels(method, path, answer.status).inc()
        self._metrics.seconds.labels(method, path).observe(time.monotonic() - answer.began)
        if answer.first_byte is not None:
            self._metrics.first_byte.labels(method, path).observe(answer.first_byte - answer.began)


class _Answer:
    """Adds the request's id to its answer, and notes what metrics need."""

    def __init__(self, scope: dict, send: Any):
        self._scope, self._send = scope, send
        self.began = time.monotonic()
        self.first_byte: float | None = None
        self.status = 500
        self.has_begun = False

    async def send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.status, self.has_begun = message["status"], True
            headers = MutableHeaders(scope=message)
            for name in ID_HEADERS:
                headers[name] = self._scope["state"]["request_id"]
        elif self.first_byte is None and message.get("body"):
            self.first_byte = time.monotonic()
        await self._send(message)
