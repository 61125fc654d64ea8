"""Messages between a worker and its engine's process: msgpack over a socket pair, read by the event loop.

| worker to engine | |
| --- | --- |
| `start` | begin to compute, and send `pulse` once per second |
| `add` | an EngineRequest |
| `abort`, `credit` | the methods of `EngineHost` |
| `stop` | end after the current step |

| engine to worker | |
| --- | --- |
| `built`, or `not built` | the first message |
| `outputs` | all outputs of a step, a list per field; and the engine's stats |
| `failure` | an EngineFailure, and the stats |
| `pulse` | how long the current step has taken, and the stats |
| `stopped` | the last message: all outputs have been sent. The worker closes its end |

An end of file means that the other process has ended. Exceptions are not pickled, since those of libraries
may not support it: only their names and texts are sent, and the attributes that the worker uses.
"""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Self

import msgpack

from ingine.engine.message_format import MessageFormat
from ingine.engine.outputs import EngineStats, FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.errors import ConfigError, EngineError, ErrorCode, InvalidRequest, ModelNotFound, UnsupportedModel
from ingine.message import Message as AssistantMessage
from ingine.message import MessageDelta, ToolCall, ToolCallDelta
from ingine.sampling_params import SamplingParams

Message = list[Any]
"""The message's name, then its values."""

_ERRORS = {kind.__name__: kind for kind in (ConfigError, ModelNotFound, UnsupportedModel, EngineError)}
_REQUEST_FIELDS = tuple(field.name for field in fields(EngineRequest))
_TUPLES = ("other_output_token_ids", "ended_choices")
_OUTPUT_FIELDS = tuple(field.name for field in fields(SeqOutput))
_MESSAGE_FIELDS = ("delta", "final_delta", "message")
"""Those of `SeqOutput` that msgpack does not take. They are sent as lists of their own fields' values."""
_STATS_FIELDS = tuple(field.name for field in fields(EngineStats))
_output_values = attrgetter(*_OUTPUT_FIELDS)
_call_values = attrgetter(*(field.name for field in fields(ToolCall)))
_call_delta_values = attrgetter(*(field.name for field in fields(ToolCallDelta)))
_stats_values = attrgetter(*_STATS_FIELDS)


class Pipe(asyncio.Protocol):
    """The worker's end, in a running loop. `receive` is called with each message, and `lost` at the end of
    file."""

    def __init__(self, receive: Callable[[Message], None], lost: Callable[[], None]):
        self._receive = receive
        self._lost = lost
        self._unpacker = make_unpacker()

    @classmethod
    async def open(
        cls, connection: socket.socket, receive: Callable[[Message], None], lost: Callable[[], None]
    ) -> Self:
        loop = asyncio.get_running_loop()
        _, pipe = await loop.create_unix_connection(lambda: cls(receive, lost), sock=connection)
        return pipe

    def send(self, *message: Any) -> None:
        """Send a message. It is dropped if the other end is closed, which `lost` reports."""
        self.write(pack(*message))

    def write(self, packed: bytes) -> None:
        """Send a message that is already packed."""
        if not self._transport.is_closing():
            self._transport.write(packed)

    def close(self) -> None:
        """Close this end once all sent messages are written."""
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, received: bytes) -> None:
        self._unpacker.feed(received)
        for message in self._unpacker:
            self._receive(message)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()


def pack(*message: Any) -> bytes:
    return msgpack.packb(message)


def make_unpacker() -> msgpack.Unpacker:
    return msgpack.Unpacker(strict_map_key=False)  # logit_bias maps ints


def pack_request(request: EngineRequest) -> dict[str, Any]:
    packed = {name: getattr(request, name) for name in _REQUEST_FIELDS}
    packed["prompt_token_ids"] = list(request.prompt_token_ids)
    packed["output_token_ids"] = list(request.output_token_ids)
    packed["other_output_token_ids"] = [list(token_ids) for token_ids in request.other_output_token_ids]
    packed["message"] = request.message and request.message.to_map()
    packed["params"] = request.params.model_dump(by_alias=True, exclude_defaults=True)
    return packed


def unpack_request(packed: dict[str, Any]) -> EngineRequest:
    """The request of `pack_request`. Raises pydantic's ValidationError for invalid sampling parameters."""
    tuples = {name: tuple(packed[name]) for name in _TUPLES}
    message = packed["message"] and MessageFormat.from_map(packed["message"])
    params = SamplingParams(**packed["params"])
    return EngineRequest(**packed | tuples | {"params": params, "message": message})


def pack_outputs(outputs: list[SeqOutput]) -> dict[str, tuple]:
    """Pack outputs as a list per field, so that each field's name is sent once per step."""
    if not outputs:
        return {}
    columns = dict(zip(_OUTPUT_FIELDS, zip(*map(_output_values, outputs), strict=True), strict=True))
    for name in _MESSAGE_FIELDS:
        columns[name] = tuple(None if value is None else _pack_message(value) for value in columns[name])
    return columns


def unpack_outputs(columns: dict[str, list]) -> list[SeqOutput]:
    if not columns:
        return []
    rows = zip(*(columns[name] for name in _OUTPUT_FIELDS), strict=True)
    outputs = [SeqOutput(*row) for row in rows]
    for output in outputs:
        if output.finish_reason is not None:
            output.finish_reason = FinishReason(output.finish_reason)
        if output.error_code is not None:
            output.error_code = ErrorCode(output.error_code)
        if output.delta is not None:
            output.delta = _unpack_delta(output.delta)
        if output.final_delta is not None:
            output.final_delta = _unpack_delta(output.final_delta)
        if output.message is not None:
            content, reasoning, calls = output.message
            output.message = AssistantMessage(content, reasoning, [ToolCall(*call) for call in calls])
    return outputs


def _pack_message(message: AssistantMessage | MessageDelta) -> tuple:
    values = _call_values if isinstance(message, AssistantMessage) else _call_delta_values
    return message.content, message.reasoning, list(map(values, message.tool_calls))


def _unpack_delta(packed: list) -> MessageDelta:
    content, reasoning, calls = packed
    return MessageDelta(content, reasoning, [ToolCallDelta(*call) for call in calls])


def pack_stats(stats: EngineStats) -> dict[str, int | float]:
    return dict(zip(_STATS_FIELDS, _stats_values(stats), strict=True))


def unpack_stats(packed: dict[str, int | float]) -> EngineStats:
    return EngineStats(**packed)


def pack_error(error: BaseException) -> dict[str, str | None]:
    return {
        "type": type(error).__name__,
        "text": str(error),
        "code": str(error.code) if isinstance(error, InvalidRequest) else None,
        "missing_module": error.name if isinstance(error, ModuleNotFoundError) else None,
    }


def unpack_error(packed: dict[str, str | None]) -> Exception:
    """The packed error: of the same type if it is one of ingine's or names a module that is not installed,
    else an EngineError."""
    name, text = packed["type"], packed["text"]
    if packed["code"] is not None:
        return InvalidRequest(ErrorCode(packed["code"]), text)
    if packed["missing_module"] is not None:
        return ModuleNotFoundError(text, name=packed["missing_module"])
    if name in _ERRORS:
        return _ERRORS[name](text)
    return EngineError(f"{name}: {text}")
