"""The paths under `/v1/responses`."""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ingine.contract.events import TerminalEvent
from ingine.contract.record import JobStatus
from ingine.errors import (
    BadRecord,
    DuplicateJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    ResultTimeout,
)
from ingine.gateway import ids, sse
from ingine.gateway.encoding import Json
from ingine.gateway.errors import Refused
from ingine.gateway.gateway import Gateway
from ingine.gateway.models import model_of
from ingine.gateway.responses.events import ResponseLog
from ingine.gateway.responses.fields import fields_of, metadata_of, response_fields
from ingine.gateway.responses.request import chat_body
from ingine.gateway.streaming import stream_response, whole_answer
from ingine.producer.events import delete_job, follow_events, submitted_job
from ingine.producer.openai.requests import chat_arguments
from ingine.producer.results import raise_unless_finished

CANCEL_WAIT_S = 10.0
"""How long a cancellation is awaited. A worker notices one at its next step."""
READS = 3
"""How often a response is read that moves on between two reads."""


async def create_response(request: Request) -> Response:
    gateway: Gateway = request.state.gateway
    caller = gateway.access.caller(request)
    body = await gateway.read_body(request)
    background, stream = _flag(body, "background"), _flag(body, "stream")
    caller.require(model_of(body))
    arguments = chat_arguments(chat_body(body))
    await gateway.workers.require()
    key = request.headers.get(ids.IDEMPOTENCY_KEY)
    cancel = not (background or ids.may_return(request))
    job_id = ids.new_id(ids.RESPONSE, caller, key)
    fields = response_fields(body, job_id, created_at=int(time.time()), background=background)
    try:
        await gateway.client.submit(
            **arguments,
            job_id=job_id,
            tenant=caller.tenant,
            metadata=metadata_of(fields),
            deadline_s=None if background else gateway.settings.gateway_timeout_s,
            stream=stream or background,
        )
    except DuplicateJob:
        if key is None:
            raise
        fields = await _fields(gateway, job_id)
    request.state.request_id = job_id
    if stream:
        parts = _parts(gateway, job_id, fields, after=-1, at_once=background)
        return await stream_response(gateway, request, job_id, parts, cancel=cancel)
    if background:
        return Json(await _read(gateway, job_id))
    log, end = await whole_answer(gateway, request, job_id, _whole(gateway, job_id), cancel=cancel)
    raise_unless_finished(end)
    return Json(log.response())


async def get_response(request: Request) -> Response:
    gateway, job_id = _known(request)
    query = request.query_params
    if query.get("stream", "false").lower() not in ("true", "1"):
        return Json(await _read(gateway, job_id))
    after = query.get("starting_after", "-1")
    if not (after.removeprefix("-").isdecimal() and after.isascii() and len(after) <= 16):
        raise Refused(400, "invalid_parameter", "starting_after must be a number", param="starting_after")
    fields = await _fields(gateway, job_id)
    parts = _parts(gateway, job_id, fields, after=int(after), at_once=True)
    return await stream_response(gateway, request, job_id, parts, cancel=False)


async def cancel_response(request: Request) -> Response:
    """Cancel the job, and return the response as it ends. One that has ended stays as it is."""
    gateway, job_id = _known(request)
    await _cancel(gateway, job_id)
    return Json(await _read(gateway, job_id))


async def delete_response(request: Request) -> Response:
    """Delete a response, and cancel it before if it has not ended."""
    gateway, job_id = _known(request)
    if not (await gateway.client.status(job_id)).status.terminal:
        await _cancel(gateway, job_id)
    if (outcome := await delete_job(gateway.client, job_id)) != "deleted":
        message = f"the response is still {outcome}, although it was cancelled: try again"
        raise Refused(409, "not_ended", message)
    return Json({"id": job_id, "object": "response", "deleted": True})


async def _cancel(gateway: Gateway, job_id: str) -> None:
    """Cancel a job, and wait until it has ended, but no longer than CANCEL_WAIT_S."""
    handle = gateway.client.attach(job_id)
    if await handle.cancel() == "requested":
        with suppress(JobCancelled, JobFailed, JobExpired, ResultTimeout):
            await handle.result(CANCEL_WAIT_S)


def _known(request: Request) -> tuple[Gateway, str]:
    """Return the gateway, and the id in the path, which is a response of the caller if there is one."""
    gateway: Gateway = request.state.gateway
    job_id = request.path_params["response_id"]
    ids.check_owner(job_id, ids.RESPONSE, gateway.access.caller(request))
    request.state.request_id = job_id
    return gateway, job_id


async def _parts(
    gateway: Gateway, job_id: str, fields: dict[str, Any], *, after: int, at_once: bool
) -> AsyncGenerator[bytes, None]:
    """The events with higher numbers than `after`, a part for each log entry.

    The log is read from its first entry: the text of an event that ends an item comes from all before it.
    at_once: begin before the job has made anything. Otherwise a job that fails without output raises its
    error.
    """
    log = ResponseLog(fields)
    begun = _bytes(log.begin(), after)
    if at_once and begun:
        yield begun
        begun = b""
    async with aclosing(follow_events(gateway.client, job_id)) as events:
        async for event in events:
            if begun and isinstance(event, TerminalEvent):
                raise_unless_finished(event)
            if part := begun + _bytes(log.add(event), after):
                yield part
            begun = b""


def _bytes(events: list[dict[str, Any]], after: int) -> bytes:
    return b"".join(sse.event(each, kind=each["type"]) for each in events if each["sequence_number"] > after)


async def _read(gateway: Gateway, job_id: str) -> dict[str, Any]:
    """Return a response as it is now. Raises JobNotFound."""
    for _ in range(READS):
        info = await gateway.client.status(job_id)
        if info.status.terminal:
            return (await _whole(gateway, job_id))[0].response()
        if (job := await submitted_job(gateway.client, job_id)) is not None:
            status = "in_progress" if info.status is JobStatus.RUNNING else "queued"
            return ResponseLog(fields_of(job_id, job.metadata)).response() | {"status": status}
    raise BadRecord(f"the record of job {job_id} says that it has not ended, and its stream does not have it")


async def _fields(gateway: Gateway, job_id: str) -> dict[str, Any]:
    """Return the fields of a response that do not depend on its output. Raises JobNotFound."""
    if (job := await submitted_job(gateway.client, job_id)) is not None:
        return fields_of(job_id, job.metadata)
    _, end = await _whole(gateway, job_id)
    return fields_of(job_id, end.metadata)


async def _whole(gateway: Gateway, job_id: str) -> tuple[ResponseLog, TerminalEvent]:
    """Wait for the end. Returns the whole log and its terminal event."""
    async with aclosing(follow_events(gateway.client, job_id)) as events:
        read = [event async for event in events]
    end = read[-1]
    assert isinstance(end, TerminalEvent)
    log = ResponseLog(fields_of(job_id, end.metadata))
    for event in read:
        log.add(event)
    return log, end


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, "invalid_type", f"{name} must be true or false", param=name)
    return bool(value)
