"""Jobs: how producers encode them, and how workers validate what any client may have sent.

`ingine.contract.keys` has the names of all keys, `ingine.contract.events` the replies. `docs/protocol.md`
describes the same in prose, for other languages.
"""

import re
from typing import Annotated, Any, Literal

import msgpack
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ingine.contract.chat import ChatFields
from ingine.contract.faults import (
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
from ingine.contract.foreign_formats import not_a_map, recognise
from ingine.contract.keys import Priority
from ingine.errors import ErrorCode, InvalidJob
from ingine.sampling_params import SamplingParams, TokenId

PROTOCOL_VERSION = 1

DEFAULT_MAX_QUEUED_JOBS = 100_000
DEFAULT_MAX_QUEUED_BYTES = 1 << 30
DEFAULT_MAX_JOB_BYTES = 1 << 20
MAX_JOB_BYTES = 8 << 20
"""Limit for every queue, since a client that may submit can raise the queue's own limit: a million tokens."""
DEFAULT_RESULT_TTL_S = 3600
MAX_METADATA_BYTES = 16 << 10

EXPECTED_OUTPUT_TOKENS = 256
"""Output tokens that a job without `max_tokens` counts for in fair shares."""
MAX_TOKEN_COST = 1 << 20
"""The most tokens that a choice counts for: no model has longer sequences. Clients set `max_tokens` to 10^9
to mean "no limit"."""

JOB_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

Name = Annotated[str, Field(pattern=rf"^{JOB_ID.pattern}$")]
Prompt = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[TokenId, ...], Field(fail_fast=True), Tag("token_ids")],
    Discriminator(lambda value: "token_ids" if isinstance(value, tuple) else "text"),
]


class Job(ChatFields):
    """A job, as producers send it in a msgpack map. Unknown fields are errors, which name the field."""

    v: Literal[1] = PROTOCOL_VERSION
    id: Name
    prompt: Prompt | None = None
    sampling: SamplingParams = SamplingParams()
    priority: Priority = Field(
        default=Priority.NORMAL, strict=False, description="Informative: the stream decides."
    )
    tenant: Name | None = None
    deadline_ms: int | None = Field(
        default=None, ge=1, lt=2**53, description="From submission, by the server's clock."
    )
    not_before_ms: int | None = Field(
        default=None, ge=1, lt=2**53, description="From submission: not begun earlier."
    )
    stream: bool = Field(default=True, description="False: nothing is published live but the terminal event.")
    reply_to: Name | None = None
    model: str | None = Field(
        default=None, max_length=256, description="Only a worker that serves it runs the job."
    )
    metadata: dict[str, Any] | None = Field(default=None, description="Comes back in the terminal event.")
    trace: str | None = Field(default=None, max_length=256, description="A W3C traceparent, for logs.")

    @field_validator("prompt", mode="before")
    @classmethod
    def _token_ids(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_input(self):
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a job has either `prompt` or `messages`")
        if self.messages is None and (name := self.given_without_messages()):
            raise ValueError(f"{name} needs `messages`")
        if self.deadline_ms is not None and (self.not_before_ms or 0) >= self.deadline_ms:
            raise ValueError("not_before_ms lies behind deadline_ms: the job could only expire")
        if self.metadata and len(msgpack.packb(self.metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is over {MAX_METADATA_BYTES} bytes")
        return self


def encode_job(job: Job) -> bytes:
    """Encode `job` as a msgpack map, without the fields that have their default.

    `sampling` has all fields that were given, even with their default: the model's own defaults apply to the
    others.
    """
    fields = job.model_dump(
        mode="python", exclude_defaults=True, exclude={"metadata", "sampling", "chat_template_kwargs"}
    )
    fields |= {"v": job.v, "id": job.id}
    if sampling := job.sampling.given():
        fields["sampling"] = sampling
    for name in ("metadata", "chat_template_kwargs"):
        if (value := getattr(job, name)) is not None:
            fields[name] = value  # model_dump would turn msgpack's extension types into lists
    return msgpack.packb(fields)


def decode_job(
    raw: bytes, *, max_bytes: int = DEFAULT_MAX_JOB_BYTES, max_num_tokens: int | None = None
) -> Job:
    """Decode and validate a job. Raises InvalidJob, with the job's id if that could be read.

    Time and memory grow no faster than the job's bytes: sizes are checked before any value is built, the
    number of containers while values are built, depth and numbers of fields before validation, which stops
    at a list's first fault. max_num_tokens: the model's longest sequence, if known. A prompt of more token
    ids or messages is not validated.
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


def token_cost(num_prompt_tokens: int, max_tokens: int | None, num_choices: int = 1) -> int:
    """Estimate the tokens of a job, for its tenant's fair share: the prompt once, all choices' output."""
    num_output_tokens = EXPECTED_OUTPUT_TOKENS if max_tokens is None else max_tokens
    return min(num_prompt_tokens + num_choices * num_output_tokens, num_choices * MAX_TOKEN_COST)


def read_job_id(raw: bytes) -> str | None:
    """Read the id of a job that need not be valid. None if it has none."""
    return _name_or_none(texts_of(raw, ("id",)).get("id"))


def read_reply_to(raw: bytes) -> str | None:
    """Read `reply_to` of a job that need not be valid. None if it has none."""
    return _name_or_none(texts_of(raw, ("reply_to",)).get("reply_to"))


def _name_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) and JOB_ID.fullmatch(value) else None
