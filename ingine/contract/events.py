"""Events, which workers append to token logs, publish on channels and send to replies streams."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from ingine.contract.choices import ChoicePositions, are_choice_ends, is_choice_of_event
from ingine.contract.faults import MAX_MAP_ENTRIES
from ingine.contract.keys import EVENT_FIELD, log_id
from ingine.contract.messages import is_delta, is_message
from ingine.contract.record import STATUS_NAME, JobStatus


@dataclass(slots=True)
class TokensEvent:
    """New tokens of one choice of a job: log entry `<position>-0`, and the same bytes as a message on its
    channel.
    """

    position: int
    """Output tokens up to the end of this event, which starts at position - len(token_ids)."""
    token_ids: list[int]
    text: str
    """Text that the event adds. It may have less or more than its tokens' text, see `TerminalEvent.text`."""
    logprobs: list[dict] | None = None
    """One for each token: {token_id, logprob, rank, top: [[token_id, logprob], ...], bytes: [...],
    decoded_token, top_bytes: [[...]], top_decoded_tokens: [...]}. An older worker sends no rank and no
    decoded tokens, or no bytes either; a job whose output has no text has neither bytes nor decoded tokens.
    """
    index: int = 0
    """The choice that the tokens belong to."""
    choice_position: int | None = None
    """Tokens of this choice up to the end of this event; `position` counts those of all choices. None in a
    job of one choice, as are the fields below.
    """
    finish_reason: str | None = None
    """stop, tool_calls or length: the choice ends with this event. `text` and `delta` then have all that was
    held back.
    """
    stop_reason: int | str | None = None
    prompt_logprobs: list[dict | None] | None = None
    """In choice 0's first event, if requested: the same as `logprobs` for each prompt token, None for the
    first of them.
    """
    delta: dict | None = None
    """What the event adds to the assistant message, as the `delta` of an OpenAI chunk: {content, reasoning,
    tool_calls: [{index, id, type, function: {name, arguments}}]}, without what adds nothing. Empty if all of
    it adds nothing; None in a job whose message is not parsed, where the text is the content.
    """
    message: dict | None = None
    """The whole assistant message of a choice that ends with this event, as OpenAI has it: {role, content,
    reasoning, tool_calls}. Only in a job whose message is parsed.
    """

    @property
    def start(self) -> int:
        """Number of output tokens before this event."""
        return self.position - len(self.token_ids)


@dataclass(slots=True)
class TerminalEvent:
    """The end of a job: log entry `<position>-1`. A job has exactly one, and its log ends there."""

    position: int
    status: JobStatus | str
    """A plain `str` is a status of a newer version."""
    job_id: str
    text: str = ""
    """The end of the text, if it was held back until now (a half character, the start of a stop string)."""
    finish_reason: str | None = None
    """stop, tool_calls, length, abort or error."""
    stop_reason: int | str | None = None
    """The stop string or the id of the stop token that ended the output; None for any other end, and for
    several choices, which have their own.
    """
    error: dict | None = None
    """{code, message} where status is failed or expired."""
    usage: dict = field(default_factory=dict)
    """num_prompt_tokens, num_cached_tokens, num_output_tokens."""
    timings: dict = field(default_factory=dict)
    """queue_ms, first_token_ms and total_ms, which the worker measures from submission; attempts."""
    metadata: dict | None = None
    choices: list[dict] | None = None
    """For a job of several choices, one for each: {index, finish_reason, num_output_tokens}; stop_reason, if
    it has one; and text, delta and message, as below, if no tokens event ended the choice.
    """
    delta: dict | None = None
    """The end of the assistant message, if it was held back until now. It follows the deltas of the tokens
    events, and has their shape. Empty if `text` alone was held back, which adds nothing, such as a tag.
    """
    message: dict | None = None
    """The whole assistant message of a job of one choice that has finished, as in `TokensEvent.message`."""

    @property
    def start(self) -> int:
        return self.position


Event = TokensEvent | TerminalEvent

_TOKENS_PACKER = msgpack.Packer()
"""Reused, since each packer has a buffer of 256 KiB. Only workers encode tokens, each in one thread."""


def encode_event(event: Event) -> bytes:
    if isinstance(event, TokensEvent):
        fields = {
            "type": "tokens",
            "position": event.position,
            "token_ids": event.token_ids,
            "text": event.text,
        }
        if event.logprobs is not None:
            fields["logprobs"] = event.logprobs
        if event.prompt_logprobs is not None:
            fields["prompt_logprobs"] = event.prompt_logprobs
        if event.choice_position is not None:
            fields |= {"index": event.index, "choice_position": event.choice_position}
            for name in ("finish_reason", "stop_reason"):
                if (value := getattr(event, name)) is not None:
                    fields[name] = value
        if event.delta is not None:
            fields["delta"] = event.delta
        if event.message:
            fields["message"] = event.message
        return _TOKENS_PACKER.pack(fields)
    fields = {"type": str(event.status)}
    for name in TerminalEvent.__slots__:
        value = getattr(event, name)
        if name != "status" and (value not in (None, "", {}) or (name == "delta" and value is not None)):
            fields[name] = value
    return msgpack.packb(fields)


UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)
"""Exceptions that `decode_event` and `decode_log` raise for bytes that no worker has written."""
_TERMINAL_TYPES = {
    "job_id": str,
    "text": str,
    "finish_reason": str | None,
    "stop_reason": int | str | None,
    "error": dict | None,
    "usage": dict,
    "timings": dict,
    "metadata": dict | None,
}
_OPTIONAL_FIELDS = (
    *("logprobs", "prompt_logprobs"),
    *("index", "choice_position", "finish_reason", "stop_reason"),
    *("delta", "message"),
)
_USAGE = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


def decode_event(raw: bytes) -> Event:
    """Decode what `encode_event` returned. Ignores unknown fields, since the worker may be newer.

    Raises one of UNREADABLE if `raw` is no event: any client may publish, and some may write logs. The
    exception's message may be as long as `raw`.
    """
    try:
        fields = msgpack.unpackb(raw, strict_map_key=False, max_map_len=MAX_MAP_ENTRIES)
    except msgpack.ExtraData:  # its message would quote the whole value
        raise ValueError("there are more bytes behind it") from None
    kind = fields.pop("type")
    if type(kind) is not str:  # the error of an enum would quote the value
        raise TypeError("its type is no text")
    if kind == "tokens":
        event = TokensEvent(
            fields["position"],
            fields["token_ids"],
            fields["text"],
            **{name: fields[name] for name in _OPTIONAL_FIELDS if name in fields},
        )
        well_formed = (
            type(event.position) is int
            and type(event.text) is str
            and type(event.token_ids) is list
            and all(type(token_id) is int and token_id >= 0 for token_id in event.token_ids)
            and event.start >= 0
            and is_choice_of_event(event)
            and (event.logprobs is None or _are_logprobs(event.logprobs, len(event.token_ids)))
            and (event.prompt_logprobs is None or _are_prompt_logprobs(event.prompt_logprobs))
            and (event.delta is None or is_delta(event.delta))
            and (event.message is None or (event.finish_reason is not None and is_message(event.message)))
        )
    else:
        known = {name: value for name, value in fields.items() if name in TerminalEvent.__slots__}
        is_newer = STATUS_NAME.fullmatch(kind) is not None and kind not in set(JobStatus)
        event = TerminalEvent(status=kind if is_newer else JobStatus(kind), **known)
        well_formed = (
            (is_newer or event.status.terminal)
            and type(event.position) is int
            and event.position >= 0
            and all(isinstance(getattr(event, name), types) for name, types in _TERMINAL_TYPES.items())
            and event.job_id != ""
            and all(type((event.error or {}).get(name, "")) is str for name in ("code", "message"))
            and all(type(event.usage.get(name, 0)) is int for name in _USAGE)
            and are_choice_ends(event.choices)
            and (event.delta is None or is_delta(event.delta))
            and (event.message is None or is_message(event.message))
        )
    if not well_formed:
        raise ValueError(f"not the shape of a {kind} event")
    return event


def _are_logprobs(logprobs: Any, number: int) -> bool:
    """Return True if they have the shape of `TokensEvent.logprobs` for `number` tokens."""
    if type(logprobs) is not list or len(logprobs) != number:
        return False
    for of_token in logprobs:
        pairs = [(of_token["token_id"], of_token["logprob"]), *of_token["top"]]
        if not all(type(token_id) is int and type(logprob) in (int, float) for token_id, logprob in pairs):
            return False
        top_bytes = of_token.get("top_bytes", [])
        if type(top_bytes) is not list:
            return False
        for named in (of_token.get("bytes"), *top_bytes):
            if named is not None and (type(named) is not list or bytes(named) is None):  # which may raise
                return False
        top_texts = of_token.get("top_decoded_tokens", [])
        if type(of_token.get("rank", 1)) is not int or type(top_texts) is not list:
            return False
        if not all(type(text) is str for text in (of_token.get("decoded_token", ""), *top_texts)):
            return False
    return True


def _are_prompt_logprobs(logprobs: Any) -> bool:
    """Return True if they have the shape of `TokensEvent.prompt_logprobs`."""
    return (
        type(logprobs) is list and logprobs[:1] == [None] and _are_logprobs(logprobs[1:], len(logprobs) - 1)
    )


def decode_log(
    job_id: str,
    position: int,
    entries: Iterable[tuple[bytes, dict[bytes, bytes]]],
    *,
    choices: ChoicePositions | None = None,
) -> list[Event]:
    """Decode entries of a job's token log that continue at `position`. The first may begin before it.

    choices: the choices' positions after the entries before these, which these entries advance. By default
    only choices within these entries are compared.

    Raises one of UNREADABLE for entries that no worker writes: no event, an id other than the event's
    position, missing or repeated tokens of the job or of a choice, tokens of a choice after its end, the end
    of another job, or an entry after the end.
    """
    events: list[Event] = []
    choices = ChoicePositions(from_start=position == 0) if choices is None else choices
    for entry_id, fields in entries:
        event = decode_event(fields[EVENT_FIELD.encode()])
        is_end, name = isinstance(event, TerminalEvent), entry_id.decode()
        if events and isinstance(events[-1], TerminalEvent):
            raise ValueError(f"entry {name} lies behind the terminal event")
        if name != log_id(event.position, terminal=is_end):
            raise ValueError(f"entry {name} has an event of position {event.position}")
        if event.start > position or (event.start < position and (events or is_end)):
            raise ValueError(f"entry {name} continues from position {event.start}, not {position}")
        if is_end and event.job_id != job_id:
            raise ValueError(f"entry {name} is the end of another job, {event.job_id[:128]!r}")
        if not is_end:
            choices.add(event)
        events.append(event)
        position = event.position
    return events
