"""Messages between a worker and its engine's process: msgpack over a socket pair, read by the event loop.

| worker to engine | |
| --- | --- |
| `start` | compute; and say `pulse` once a second |
| `add` | an EngineRequest |
| `abort`, `credit` | as `EngineHost` has them |
| `stop` | end after the step under way |

| engine to worker | |
| --- | --- |
| `built`, or `not built` | the first word |
| `outputs` | of a step, all in one, by field; and the engine's stats |
| `failure` | an EngineFailure, and the stats |
| `pulse` | how long the step under way has taken, and the stats |
| `stopped` | the last word: all outputs have been sent. The worker closes its end |

The end of file is the end of whoever was there. No exception travels, since those of libraries need not
survive that: only its name and text, and what of it the worker acts upon.
"""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Self

import msgpack

from ingine.engine.outputs import EngineStats, FinishReason, SeqOutput
from ingine.engine.request import EngineRequest
from ingine.errors import ConfigError, EngineError, ErrorCode, InvalidRequest, ModelNotFound, UnsupportedModel
from ingine.sampling_params import SamplingParams

Message = list[Any]
"""Its name, then what it brings."""

_ERRORS = {kind.__name__: kind for kind in (ConfigError, ModelNotFound, UnsupportedModel, EngineError)}
_REQUEST_FIELDS = tuple(field.name for field in fields(EngineRequest))
_OUTPUT_FIELDS = tuple(field.name for field in fields(SeqOutput))
_STATS_FIELDS = tuple(field.name for field in fields(EngineStats))
_output_values = attrgetter(*_OUTPUT_FIELDS)
_stats_values = attrgetter(*_STATS_FIELDS)


class Pipe(asyncio.Protocol):
    """The worker's end, in a running loop. `receive` gets each message, and `lost` is called at the end."""

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
        """To nobody, if the other end is gone: `lost` tells."""
        self.write(pack(*message))

    def write(self, packed: bytes) -> None:
        """As `send`, of a message that is packed already."""
        if not self._transport.is_closing():
            self._transport.write(packed)

    def close(self) -> None:
        """Once all that was sent is written."""
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
    packed["params"] = request.params.model_dump(exclude_defaults=True)
    return packed


def unpack_request(packed: dict[str, Any]) -> EngineRequest:
    """Raises pydantic's ValidationError for what are no sampling parameters."""
    return EngineRequest(**packed | {"params": SamplingParams(**packed["params"])})


def pack_outputs(outputs: list[SeqOutput]) -> dict[str, tuple]:
    """A list for each field, so that a step has each name once, however many sequences are in it."""
    columns = zip(*map(_output_values, outputs), strict=True)  # none, without outputs
    return dict(zip(_OUTPUT_FIELDS, columns, strict=bool(outputs)))


def unpack_outputs(columns: dict[str, list]) -> list[SeqOutput]:
    if not columns:
        return []
    rows = zip(*(columns[name] for name in _OUTPUT_FIELDS), strict=True)
    outputs = [SeqOutput(*row) for row in rows]
    for output in outputs:
        if output.finish_reason is not None:
            output.finish_reason = FinishReason(output.finish_reason)
    return outputs


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
    """Of the same type where it is one of ours or says what is not installed, else an EngineError."""
    name, text = packed["type"], packed["text"]
    if packed["code"] is not None:
        return InvalidRequest(ErrorCode(packed["code"]), text)
    if packed["missing_module"] is not None:
        return ModuleNotFoundError(text, name=packed["missing_module"])
    if name in _ERRORS:
        return _ERRORS[name](text)
    return EngineError(f"{name}: {text}")
