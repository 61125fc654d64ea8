"""The contract between producers, workers and consumers: jobs and events. `ingine.keys` has the names.

Both sides import the two and nothing else of each other; `docs/protocol.md` says the same in prose, for other
languages. Needs msgpack and pydantic only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgpack
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ingine.errors import ErrorCode, InvalidJob
from ingine.foreign_formats import not_a_map, recognise
from ingine.job_faults import (
    MAX_FIELDS,
    MAX_MAP_ENTRIES,
    MAX_NESTING,
    MAX_REASON_CHARS,
    BoundedContainers,
    TooManyParts,
    check_sizes,
    deeper_than,
    explain,
    longer_than,
    texts_of,
    too_many_fields,
)
from ingine.keys import EVENT_FIELD, Priority, log_id
from ingine.sampling_params import SamplingParams, TokenId

PROTOCOL_VERSION = 1

DEFAULT_MAX_QUEUED_JOBS = 100_000
DEFAULT_MAX_QUEUED_BYTES = 1 << 30
DEFAULT_MAX_JOB_BYTES = 1 << 20
MAX_JOB_BYTES = 8 << 20
"""Whatever a queue's own limit says, since whoever may submit can change that: a million tokens."""
DEFAULT_RESULT_TTL_S = 3600
MAX_METADATA_BYTES = 16 << 10
MAX_MESSAGES = 4096

EXPECTED_OUTPUT_TOKENS = 256
"""What a job without `max_tokens` is taken to generate, for fair shares."""
MAX_TOKEN_COST = 1 << 20
"""No model has longer sequences: `max_tokens` of 10^9 is a way to say "no limit"."""

JOB_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class JobStatus(StrEnum):
    DELAYED = "delayed"
    """Its time has not come: `not_before_ms`, or the pause after a step that failed under it."""
    QUEUED = "queued"
    """In the stream: not begun, or handed over by a worker that stopped; its log is kept."""
    RUNNING = "running"
    """A worker holds the lease, under the attempt number in the job's hash."""
    FINISHED = "finished"
    """All tokens are in the log; `finish_reason` is `stop` or `length`."""
    FAILED = "failed"
    """It cannot be run, or could not; `error` in the terminal event says why."""
    CANCELLED = "cancelled"
    """Somebody cancelled it. The tokens made until then are in the log."""
    EXPIRED = "expired"
    """Its deadline passed first. The tokens made until then are in the log."""

    @property
    def terminal(self) -> bool:
        return self not in (JobStatus.DELAYED, JobStatus.QUEUED, JobStatus.RUNNING)


# ---------------------------------------------------------------------------------------------- jobs

Name = Annotated[str, Field(pattern=rf"^{JOB_ID.pattern}$")]
Prompt = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[TokenId, ...], Field(fail_fast=True), Tag("token_ids")],
    Discriminator(lambda value: "token_ids" if isinstance(value, tuple) else "text"),
]


class Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str


class Job(BaseModel):
    """What a producer pushes, as a msgpack map. Unknown fields are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    v: Literal[1] = PROTOCOL_VERSION
    id: Name
    prompt: Prompt | None = None
    messages: Annotated[tuple[Message, ...], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    sampling: SamplingParams = SamplingParams()
    priority: Priority = Field(Priority.NORMAL, strict=False, description="Informative: the stream decides.")
    tenant: Name | None = None
    deadline_ms: int | None = Field(
        None, ge=1, lt=2**53, description="From submission, by the server's clock."
    )
    not_before_ms: int | None = Field(None, ge=1, lt=2**53, description="From submission: not begun earlier.")
    stream: bool = Field(True, description="False: nothing is published live but the terminal event.")
    reply_to: Name | None = None
    model: str | None = Field(None, max_length=256, description="Only a worker that serves it runs the job.")
    metadata: dict[str, Any] | None = Field(None, description="Comes back in the terminal event.")
    trace: str | None = Field(None, max_length=256, description="A W3C traceparent, for logs.")

    @field_validator("prompt", "messages", mode="before")
    @classmethod
    def _list_or_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_input(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a job has either `prompt` or `messages`")
        if self.deadline_ms is not None and (self.not_before_ms or 0) >= self.deadline_ms:
            raise ValueError("not_before_ms lies behind deadline_ms: the job could only expire")
        if self.metadata and len(msgpack.packb(self.metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is over {MAX_METADATA_BYTES} bytes")
        return self


def encode_job(job: Job) -> bytes:
    """The msgpack map of `job`, without the fields that have their default.

    Of `sampling` it has what was given, also at its default: what was not is the model's to decide.
    """
    fields = job.model_dump(mode="python", exclude_defaults=True, exclude={"metadata", "sampling"})
    fields |= {"v": job.v, "id": job.id}
    if sampling := job.sampling.given():
        fields["sampling"] = sampling
    if job.metadata is not None:
        fields["metadata"] = job.metadata  # as it is: a dump would make lists of msgpack's extension types
    return msgpack.packb(fields)


def decode_job(
    raw: bytes, *, max_bytes: int = DEFAULT_MAX_JOB_BYTES, max_num_tokens: int | None = None
) -> Job:
    """Validate what came through the door. Raises InvalidJob, with the job's id if that could be read.

    Sizes are checked before anything is built, the number of containers while it is, depth and numbers of
    fields before anything is validated, and validation stops at a list's first fault: neither time nor memory
    grows faster than the job's bytes. `max_num_tokens`: of a sequence of the model's, if that is known. A
    prompt of more token ids or messages is not validated.
    """
    if len(raw) > max_bytes:
        raise InvalidJob(ErrorCode.JOB_TOO_LARGE, f"the job has {len(raw)} bytes, the limit is {max_bytes}")
    containers = BoundedContainers()
    try:
        check_sizes(raw, max_num_tokens)
        fields = msgpack.unpackb(
            raw, strict_map_key=False, object_pairs_hook=containers.map, list_hook=containers.list
        )
    except TooManyParts as error:
        names = {name: _name_or_none(text) for name, text in texts_of(raw, ("id", "reply_to")).items()}
        raise InvalidJob(
            error.code, str(error), job_id=names.get("id"), reply_to=names.get("reply_to")
        ) from None
    except msgpack.StackError:
        raise InvalidJob(ErrorCode.NESTED_TOO_DEEP, f"nested deeper than {MAX_NESTING} levels") from None
    except (ValueError, TypeError) as error:  # all of msgpack's errors, bad UTF-8, unhashable map keys
        reason = recognise(raw) or str(error) or type(error).__name__
        raise InvalidJob(ErrorCode.NOT_MSGPACK, f"not a msgpack value: {reason}") from None
    if not isinstance(fields, dict):
        raise InvalidJob(ErrorCode.INVALID_SHAPE, not_a_map(fields))

    job_id, reply_to = (_name_or_none(fields.get(name)) for name in ("id", "reply_to"))
    if containers.num > MAX_NESTING and deeper_than(fields, MAX_NESTING):
        code, message = ErrorCode.NESTED_TOO_DEEP, f"nested deeper than {MAX_NESTING} levels"
    elif containers.largest_map > MAX_MAP_ENTRIES:
        code = ErrorCode.INVALID_SHAPE
        message = f"a map of {containers.largest_map} entries, and {MAX_MAP_ENTRIES} is the limit"
    elif containers.largest_map > MAX_FIELDS and (too_many := too_many_fields(fields)):
        code, message = ErrorCode.INVALID_SHAPE, too_many
    elif too_long := longer_than(fields, max_num_tokens):
        code, message = ErrorCode.PROMPT_TOO_LONG, too_long
    else:
        try:
            return Job.model_validate(fields)
        except ValidationError as error:
            code, message = explain(error)
    raise InvalidJob(code, message[:MAX_REASON_CHARS], job_id=job_id, reply_to=reply_to)


def token_cost(num_prompt_tokens: int, max_tokens: int | None) -> int:
    """Tokens that a job counts for in its tenant's fair share, before anybody knows how many it takes."""
    num_output_tokens = EXPECTED_OUTPUT_TOKENS if max_tokens is None else max_tokens
    return min(num_prompt_tokens + num_output_tokens, MAX_TOKEN_COST)


def read_job_id(raw: bytes) -> str | None:
    """The id of what need not be a valid job."""
    return _name_or_none(texts_of(raw, ("id",)).get("id"))


def read_reply_to(raw: bytes) -> str | None:
    """The replies stream that is named by what need not be a valid job."""
    return _name_or_none(texts_of(raw, ("reply_to",)).get("reply_to"))


def _name_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and JOB_ID.fullmatch(value) else None


# -------------------------------------------------------------------------------------------- events


@dataclass(slots=True)
class TokensEvent:
    """New tokens of one job: log entry `<position>-0`, and the same bytes on its channel."""

    position: int
    """Output tokens committed with and before this event. It starts at position - len(token_ids)."""
    token_ids: list[int]
    text: str
    """What these tokens add to the text: often less or more than their own, see `TerminalEvent`."""
    logprobs: list[dict] | None = None
    """One a token: {token_id, logprob, top: [[token_id, logprob], ...], bytes: [...], top_bytes: [[...]]}. An
    older worker, or a model without a tokenizer, gives no bytes.
    """

    @property
    def start(self) -> int:
        """Output tokens before this event."""
        return self.position - len(self.token_ids)


@dataclass(slots=True)
class TerminalEvent:
    """How the job ended: log entry `<position>-1`. There is exactly one a job, and nothing after it."""

    position: int
    status: JobStatus | str
    """A plain `str`: a newer version's, which may know what it means."""
    job_id: str
    text: str = ""
    """The end of the text that was held back until now (a half character, the start of a stop string)."""
    finish_reason: str | None = None
    """stop, length, abort or error."""
    error: dict | None = None
    """{code, message} where status is failed or expired."""
    usage: dict = field(default_factory=dict)
    """num_prompt_tokens, num_cached_tokens, num_output_tokens."""
    timings: dict = field(default_factory=dict)
    """queue_ms, first_token_ms and total_ms from submission, by the worker's measure; attempts."""
    metadata: dict | None = None

    @property
    def start(self) -> int:
        return self.position


Event = TokensEvent | TerminalEvent

_TOKENS_PACKER = msgpack.Packer()
"""Kept, since each has a buffer of 256 KiB. Only workers make tokens, each of them in one thread."""


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
        return _TOKENS_PACKER.pack(fields)
    fields = {"type": str(event.status)}
    for name in TerminalEvent.__slots__:
        value = getattr(event, name)
        if name != "status" and value not in (None, "", {}):
            fields[name] = value
    return msgpack.packb(fields)


STATUS_NAME = re.compile(r"[a-z_]{1,32}")
"""What a status of any version looks like."""
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError)
"""What `decode_event` and `decode_log` raise for bytes that no worker has written."""
_TERMINAL_TYPES = {
    "job_id": str,
    "text": str,
    "finish_reason": str | None,
    "error": dict | None,
    "usage": dict,
    "timings": dict,
    "metadata": dict | None,
}
_USAGE = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens")


def decode_event(raw: bytes) -> Event:
    """Inverse of `encode_event`. Fields that this version does not know are ignored: workers may be newer.

    Raises one of UNREADABLE for what is no event, since anybody may publish, and some may write logs. A
    message may be as long as `raw`.
    """
    try:
        fields = msgpack.unpackb(raw, strict_map_key=False, max_map_len=MAX_MAP_ENTRIES)
    except msgpack.ExtraData:  # which has all that was read in it, and would be quoted with that
        raise ValueError("there are more bytes behind it") from None
    kind = fields.pop("type")
    if type(kind) is not str:  # an enum's error quotes what it is asked for
        raise TypeError("its type is no text")
    if kind == "tokens":
        event = TokensEvent(fields["position"], fields["token_ids"], fields["text"], fields.get("logprobs"))
        well_formed = (
            type(event.position) is int
            and type(event.text) is str
            and type(event.token_ids) is list
            and all(type(token_id) is int and token_id >= 0 for token_id in event.token_ids)
            and event.start >= 0
            and (event.logprobs is None or _are_logprobs(event.logprobs, len(event.token_ids)))
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
        )
    if not well_formed:
        raise ValueError(f"not the shape of a {kind} event")
    return event


def _are_logprobs(logprobs: Any, number: int) -> bool:
    """Whether they are of the shape that `TokensEvent.logprobs` has, for so many tokens."""
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
    return True


def decode_log(
    job_id: str, position: int, entries: Iterable[tuple[bytes, dict[bytes, bytes]]]
) -> list[Event]:
    """The events of entries of a job's token log, which follow on `position`; the first may begin before it.

    Raises one of UNREADABLE for what no worker writes: an entry that is no event, or whose id is not its
    event's position, tokens that are missing or that are there twice, another job's end, and whatever comes
    behind the end.
    """
    events: list[Event] = []
    for entry_id, fields in entries:
        event = decode_event(fields[EVENT_FIELD.encode()])
        is_end, name = isinstance(event, TerminalEvent), entry_id.decode()
        if events and isinstance(events[-1], TerminalEvent):
            raise ValueError(f"entry {name} lies behind the terminal event")
        if name != log_id(event.position, terminal=is_end):
            raise ValueError(f"entry {name} has an event of position {event.position}")
        if event.start > position or (event.start < position and (events or is_end)):
            raise ValueError(f"entry {name} goes on from position {event.start}, not {position}")
        if is_end and event.job_id != job_id:
            raise ValueError(f"entry {name} is the end of another job, {event.job_id[:128]!r}")
        events.append(event)
        position = event.position
    return events
