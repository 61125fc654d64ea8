"""A web app over ingine: server-sent events, cancellation, and errors as HTTP status codes.

    pip install fastapi uvicorn
    uvicorn web_fastapi:app --app-dir examples

Needs a worker: `ingine worker`. docs/tutorial/web-app.md explains each part.
"""

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Annotated

from anyio import CancelScope
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from ingine import AsyncClient
from ingine.producer import (
    AsyncJobHandle,
    ClientError,
    DuplicateJob,
    InvalidArgument,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    NoWorker,
    QueueFull,
    RateLimited,
    ResultTimeout,
    ServerUnavailable,
)

STATUS_CODES: dict[type[ClientError], int] = {
    InvalidJob: 422,
    InvalidArgument: 422,
    RateLimited: 429,
    QueueFull: 503,
    NoWorker: 503,
    ServerUnavailable: 503,
    JobNotFound: 404,
    DuplicateJob: 409,
    JobCancelled: 409,
    JobExpired: 504,
    ResultTimeout: 504,
}
"""Any other ClientError is 502: the job failed, or its record is damaged."""
REQUEST_FAULTS = {
    "empty_prompt",
    "invalid_messages",
    "invalid_parameter",
    "invalid_token_id",
    "prompt_too_costly",
    "prompt_too_long",
    "unknown_model",
}
"""Codes of a JobFailed that the user can fix by changing the request."""

client = AsyncClient()
"""One client for the app. It connects at its first call, separately in each process and event loop."""


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await client.aclose()


app = FastAPI(lifespan=lifespan)


class Chat(BaseModel):
    message: str = Field(min_length=1, max_length=4000)
    max_tokens: int = Field(256, ge=1, le=1024)


async def submit(chat: Chat) -> AsyncJobHandle:
    messages = [{"role": "user", "content": chat.message}]
    return await client.submit(messages=messages, max_tokens=chat.max_tokens, deadline_s=120)


@app.post("/complete")
async def complete(chat: Chat) -> dict[str, str]:
    """Return the whole answer at once. A job that takes longer than a minute is cancelled."""
    job = await submit(chat)
    result = await job.result(timeout=60, cancel=True)
    return {"job_id": job.job_id, "text": result.text, "finish_reason": result.finish_reason}


@app.post("/chat")
async def chat(chat: Chat) -> StreamingResponse:
    """Return the answer as server-sent events. If the browser disconnects, the job is cancelled."""
    job = await submit(chat)
    return event_stream(job, events_or_cancel(job))


@app.post("/jobs", status_code=202)
async def start(chat: Chat) -> dict[str, str]:
    """Submit a job that continues whether or not a browser reads it."""
    return {"job_id": (await submit(chat)).job_id}


@app.get("/jobs/{job_id}/events")
async def follow(job_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> StreamingResponse:
    """Return the job's events after `Last-Event-ID`: an EventSource that reconnects misses nothing."""
    await client.status(job_id)  # JobNotFound becomes a 404 here, before the stream begins
    job = client.attach(job_id, last_event_id)
    return event_stream(job, events(job))


@app.delete("/jobs/{job_id}")
async def cancel(job_id: str) -> dict[str, str]:
    return {"outcome": await client.cancel(job_id)}


def event_stream(job: AsyncJobHandle, lines: AsyncGenerator[str, None]) -> StreamingResponse:
    headers = {"X-Job-Id": job.job_id, "Cache-Control": "no-cache"}
    headers["X-Accel-Buffering"] = "no"  # otherwise nginx buffers events before it forwards them
    return StreamingResponse(lines, media_type="text/event-stream", headers=headers)


async def events(job: AsyncJobHandle) -> AsyncGenerator[str, None]:
    """Yield an event for each chunk, with its position as id; then `end` or `error`."""
    try:
        async with aclosing(job.stream()) as chunks:
            async for chunk in chunks:
                yield event("token", {"text": chunk.text}, chunk.position)
    except ClientError as error:
        yield event("error", {"status": status_code(error), "message": str(error)})
    else:
        yield event("end", {"job_id": job.job_id})


async def events_or_cancel(job: AsyncJobHandle) -> AsyncGenerator[str, None]:
    """Yield the job's events. If the reader stops before the last one, cancel the job."""
    has_ended = False
    try:
        async with aclosing(events(job)) as lines:
            async for line in lines:
                yield line
        has_ended = True
    finally:
        if not has_ended:
            with CancelScope(shield=True):  # this task is being cancelled itself
                await job.cancel()


def event(name: str, data: dict[str, object], position: int | None = None) -> str:
    event_id = "" if position is None else f"id: {position}\n"
    return f"{event_id}event: {name}\ndata: {json.dumps(data)}\n\n"


@app.exception_handler(ClientError)
async def error_response(_: Request, error: ClientError) -> JSONResponse:
    status = status_code(error)
    headers = {}
    if isinstance(error, RateLimited):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif status == 503:
        headers["Retry-After"] = "5"
    body = {"error": type(error).__name__, "code": getattr(error, "code", None), "message": str(error)}
    return JSONResponse(body, status, headers)


def status_code(error: ClientError) -> int:
    if isinstance(error, JobFailed) and error.code in REQUEST_FAULTS:
        return 422
    return next((code for kind, code in STATUS_CODES.items() if isinstance(error, kind)), 502)
