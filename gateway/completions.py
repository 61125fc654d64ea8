"""`/v1/chat/completions` and `/v1/completions`: a job for each request, answered whole or as a stream."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ingine.contract.events import TokensEvent
from ingine.errors import DuplicateJob
from ingine.gateway import ids
from ingine.gateway.access import Caller
from ingine.gateway.chunks import ChatChunks, Chunks, TextChunks, with_alias
from ingine.gateway.encoding import Json
from ingine.gateway.errors import Refused
from ingine.gateway.gateway import Gateway
from ingine.gateway.models import model_of
from ingine.gateway.sse import DONE
from ingine.gateway.streaming import stream_response, whole_answer
from ingine.producer.events import follow_events
from ingine.producer.openai.requests import chat_arguments, completion_arguments, echoes
from ingine.producer.openai.responses import chat_completion, text_completion
from ingine.producer.results import Result


@dataclass(frozen=True)
class Asked:
    """A request, read."""

    kind: str
    """The beginning of its job's id."""
    model: str
    arguments: dict[str, Any]
    """Arguments of `submit`."""
    stream: bool
    include_usage: bool
    prompt: str = ""
    """What a completion's text begins with."""

    def chunks(self, job_id: str, created: int) -> Chunks:
        options = {"model": self.model, "created": created, "include_usage": self.include_usage}
        if self.kind == ids.CHAT:
            return ChatChunks(job_id, **options)
        return TextChunks(job_id, prompt=self.prompt, **options)

    def body(self, result: Result, created: int) -> dict[str, Any]:
        if self.kind == ids.COMPLETION:
            body = text_completion(result, model=self.model, created=created, prompt=self.prompt)
        else:
            body = chat_completion(result, model=self.model, created=created)
            for choice in body["choices"]:
                choice["message"] = with_alias(choice["message"])
        return body | {"id": result.job_id}


def read_chat(body: dict[str, Any]) -> Asked:
    fields, stream, include_usage = _without_stream(body)
    return Asked(ids.CHAT, model_of(body), chat_arguments(fields), stream, include_usage)


def read_completion(body: dict[str, Any]) -> Asked:
    fields, stream, include_usage = _without_stream(body)
    arguments = completion_arguments(fields)
    prompt = arguments["prompt"] if echoes(fields, arguments) else ""
    return Asked(ids.COMPLETION, model_of(body), arguments, stream, include_usage, prompt)


async def create_chat_completion(request: Request) -> Response:
    return await _create(request, read_chat)


async def create_completion(request: Request) -> Response:
    return await _create(request, read_completion)


async def _create(request: Request, read: Callable[[dict[str, Any]], Asked]) -> Response:
    gateway: Gateway = request.state.gateway
    caller = gateway.access.caller(request)
    asked = read(await gateway.read_body(request))
    caller.require(asked.model)
    last_event_id = request.headers.get("last-event-id")
    if asked.stream and last_event_id:
        job_id, position, ended = ids.read_position(last_event_id)
        ids.check_owner(job_id, asked.kind, caller)
        submitted_at_ms = (await gateway.client.status(job_id)).submitted_at_ms or 0
        created = submitted_at_ms // 1000
    else:
        job_id, position, ended = await _submit(gateway, request, caller, asked), 0, False
        created = int(time.time())
    request.state.request_id = job_id
    cancel = not ids.may_return(request)
    if asked.stream:
        parts = _parts(gateway, job_id, position, asked.chunks(job_id, created), ended=ended)
        return await stream_response(gateway, request, job_id, parts, cancel=cancel)
    work = gateway.client.attach(job_id).result()
    result = await whole_answer(gateway, request, job_id, work, cancel=cancel)
    return Json(asked.body(result, created))


async def _submit(gateway: Gateway, request: Request, caller: Caller, asked: Asked) -> str:
    """Submit the job, and return its id. The same Idempotency-Key finds the same job again."""
    await gateway.workers.require()
    key = request.headers.get(ids.IDEMPOTENCY_KEY)
    job_id = ids.new_id(asked.kind, caller, key)
    try:
        await gateway.client.submit(
            **asked.arguments,
            job_id=job_id,
            tenant=caller.tenant,
            deadline_s=gateway.settings.gateway_timeout_s,
            stream=asked.stream,
        )
    except DuplicateJob:
        if key is None:
            raise
    return job_id


async def _parts(
    gateway: Gateway, job_id: str, position: int, chunks: Chunks, *, ended: bool
) -> AsyncGenerator[bytes, None]:
    """The stream after `position`, a part for each log entry that has something new for the client.

    ended: the client has all chunks of the job's end already.
    """
    async with aclosing(follow_events(gateway.client, job_id, position)) as events:
        async for event in events:
            if isinstance(event, TokensEvent):
                if part := chunks.of_tokens(event):
                    yield part
            else:
                last = chunks.of_end(event)
                yield DONE if ended else last + DONE


def _without_stream(body: dict[str, Any]) -> tuple[dict[str, Any], bool, bool]:
    """Return the body without `stream` and `stream_options`, and what they say: stream, include_usage."""
    fields = dict(body)
    stream, options = fields.pop("stream", None), fields.pop("stream_options", None)
    if stream is not None and not isinstance(stream, bool):
        raise Refused(400, "invalid_type", "stream must be true or false", param="stream")
    if options is None:
        return fields, bool(stream), False
    if not stream:
        raise Refused(400, "invalid_parameter", "stream_options needs stream: true", param="stream_options")
    if not isinstance(options, dict):
        raise Refused(400, "invalid_type", "stream_options must be an object", param="stream_options")
    known = {"include_usage", "include_obfuscation"}  # the latter pads chunks, at OpenAI only
    for name, value in options.items():
        if name not in known or not isinstance(value, bool):
            where = f"stream_options.{name}"
            message = f"{where} must be true or false" if name in known else f"{where} is not supported"
            raise Refused(400, "unsupported_parameter", message, param="stream_options")
    return fields, True, bool(options.get("include_usage"))
