"""Build a valid job from the arguments of `submit`, and an error from the script's reply. Does no I/O."""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import msgpack

from ingine.contract.calls.producing import SubmitReply, SubmitVerdict, submit
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.jobs import Job, decode_job, encode_job, token_cost
from ingine.contract.keys import Keys, Priority, partition_of, read_num_partitions
from ingine.errors import (
    ClientError,
    DuplicateJob,
    ErrorCode,
    InvalidArgument,
    InvalidJob,
    QueueFull,
    RateLimited,
)
from ingine.producer.arguments import plain, seconds
from ingine.sampling_params import NEUTRAL_PARAMS, SamplingParams

MAX_IDEMPOTENCY_KEY = 256
BYTES_PER_TOKEN = 4


class Repartitioned(Exception):
    """The queue has another number of partitions now. The job was not accepted: it belongs to another one."""

    def __init__(self, num_partitions: int):
        super().__init__(num_partitions)
        self.num_partitions = num_partitions


@dataclass(frozen=True, slots=True)
class Submission:
    """A job to submit, and the nonce by which the script recognises it if it is sent twice."""

    job: Job
    raw: bytes
    idempotency_key: str | None = None
    chosen_id: bool = True
    """The caller chose the job's id. Otherwise it is random, and may be replaced."""
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)

    def placed(self, num_partitions: int) -> "Submission":
        """Return the submission with a job id in the partition of its idempotency key, which holds the key.

        Raises InvalidJob if the caller gave both a job id and a key, and there is more than one partition.
        """
        if self.idempotency_key is None or num_partitions == 1:
            return self
        if self.chosen_id:
            raise InvalidJob(
                ErrorCode.INVALID_PARAMETER,
                "give a job_id or an idempotency_key, not both: in a queue with partitions each decides "
                "where the job lives",
                job_id=self.job.id,
            )
        job, partition = self.job, partition_of(self.idempotency_key, num_partitions)
        while partition_of(job.id, num_partitions) != partition:
            job = job.model_copy(update={"id": uuid.uuid4().hex})
        return replace(self, job=job, raw=encode_job(job))

    @property
    def cost(self) -> int:
        """Estimate the job's tokens, for fair shares. The prompt is not tokenised."""
        job = self.job
        prompt = job.prompt or "".join(job.chat_texts())
        num_prompt_tokens = (
            len(prompt.encode()) // BYTES_PER_TOKEN if isinstance(prompt, str) else len(prompt)
        )
        return token_cost(num_prompt_tokens, job.sampling.max_tokens, job.sampling.n)

    def script_call(
        self, keys: Keys, num_partitions: int = 1, same: str | None = None
    ) -> ScriptCall[SubmitReply]:
        """Return the call that submits the job. same: the job id in an earlier reply, as in `submit`."""
        return submit(
            keys,
            self.job,
            self.raw,
            nonce=self.nonce,
            cost=self.cost,
            idempotency_key=self.idempotency_key,
            num_partitions=num_partitions,
            same=same,
        )

    def accepted_id(self, reply: SubmitReply, keys: Keys) -> str:
        """Return the id of the job that was accepted, or that has this idempotency key.

        Raises an error for any other verdict, and Repartitioned if the job belongs to another partition.
        """
        detail = reply.detail
        match reply.verdict:
            case SubmitVerdict.ACCEPTED | SubmitVerdict.SAME:
                return detail
            case SubmitVerdict.PARTITIONS:
                try:
                    raise Repartitioned(read_num_partitions(detail.encode()))
                except ValueError as error:
                    raise ClientError(str(error)) from None
            case SubmitVerdict.DUPLICATE:
                raise DuplicateJob(
                    f"job {self.job.id} exists already: attach to it, or submit under another job_id"
                )
            case SubmitVerdict.FULL:
                raise QueueFull(
                    f"queue {keys.queue!r} is at its limit of {detail} jobs, nothing was accepted: "
                    "try again later, start more workers, or raise max_jobs"
                )
            case SubmitVerdict.FULL_BYTES:
                raise QueueFull(
                    f"queue {keys.queue!r} is at its limit of {detail} bytes, nothing was accepted: "
                    "try again later, start more workers, or raise max_bytes"
                )
            case SubmitVerdict.RATE:
                raise RateLimited(
                    f"tenant {self.job.tenant or ''!r} submits faster than queue {keys.queue!r} allows, "
                    f"nothing was accepted: try again in {detail} ms, or raise max_jobs_per_s",
                    retry_after_s=int(detail) / 1000,
                )
            case SubmitVerdict.TOO_LARGE:
                raise InvalidJob(
                    ErrorCode.JOB_TOO_LARGE,
                    f"the job has {len(self.raw)} bytes, the limit of queue {keys.queue!r} is {detail}",
                    job_id=self.job.id,
                )


def build_submission(
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Sequence[dict[str, Any]] | None = None,
    tools: Sequence[dict[str, Any]] | None = None,
    tool_choice: str | dict[str, Any] | None = None,
    parallel_tool_calls: bool = True,
    chat_template_kwargs: dict[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    allow_special_tokens: bool = False,
    sampling: SamplingParams | dict[str, Any] | None = None,
    priority: Priority | str = Priority.NORMAL,
    deadline_s: float | timedelta | None = None,
    not_before_s: float | timedelta | None = None,
    idempotency_key: str | None = None,
    reply_to: str | None = None,
    metadata: dict[str, Any] | None = None,
    tenant: str | None = None,
    model: str | None = None,
    stream: bool = True,
    trace: str | None = None,
    job_id: str | None = None,
    **sampling_fields: Any,
) -> Submission:
    """Build a submission from `AsyncClient.submit`'s arguments.

    Raises InvalidJob, and InvalidArgument for an unknown keyword.
    """
    if unknown := sampling_fields.keys() - SamplingParams.model_fields.keys() - NEUTRAL_PARAMS.keys():
        raise InvalidArgument(
            f"submit() has no argument {sorted(unknown)[0]!r}, nor is it a sampling parameter"
        )
    if sampling is not None and sampling_fields:
        raise InvalidArgument(
            f"give {', '.join(sorted(sampling_fields))} inside sampling=, or leave sampling= out"
        )
    _check_idempotency_key(idempotency_key)
    fields = {
        "id": uuid.uuid4().hex if job_id is None else job_id,
        "prompt": prompt,
        "messages": messages,
        "tools": tools,
        "tool_choice": tool_choice,
        "parallel_tool_calls": parallel_tool_calls,
        "chat_template_kwargs": chat_template_kwargs,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        "allow_special_tokens": allow_special_tokens,
        "sampling": _sampling_fields(sampling_fields if sampling is None else sampling),
        "priority": priority,
        "tenant": tenant,
        "deadline_ms": _milliseconds("deadline_s", deadline_s),
        "not_before_ms": _milliseconds("not_before_s", not_before_s),
        "stream": stream,
        "reply_to": reply_to,
        "model": model,
        "metadata": metadata,
        "trace": trace,
    }
    job = _validated({name: value for name, value in fields.items() if value is not None})
    return Submission(job, encode_job(job), idempotency_key, chosen_id=job_id is not None)


def submission_of(job: Any) -> Submission:
    """Build a submission from an item of `submit_many`: a Job, or a dict of `submit`'s arguments."""
    if isinstance(job, Job):
        return Submission(job, encode_job(job))
    if not isinstance(job, Mapping) or not all(isinstance(name, str) for name in job):
        raise InvalidArgument(
            f"submit_many() takes dicts of submit()'s arguments, or Jobs, not a {type(job).__name__}"
        )
    return build_submission(**job)


def _check_idempotency_key(key: Any) -> None:
    if key is None:
        return
    if not isinstance(key, str):
        raise InvalidJob(
            ErrorCode.INVALID_TYPE, f"`idempotency_key` must be a string, not {type(key).__name__}"
        )
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidJob(
            ErrorCode.INVALID_PARAMETER, f"an idempotency_key has 1 to {MAX_IDEMPOTENCY_KEY} characters"
        )


def _sampling_fields(sampling: Any) -> Any:
    """Convert sampling parameters to the wire format. Returns other values unchanged, for validation."""
    if isinstance(sampling, SamplingParams):
        return sampling.given()
    if isinstance(sampling, Mapping) and isinstance(bias := sampling.get("logit_bias"), Mapping):
        # Token ids may be strings, as in OpenAI's API: keys of JSON are.
        ids = {int(i) if isinstance(i, str) and i.isdecimal() else i: value for i, value in bias.items()}
        return {**sampling, "logit_bias": ids}
    return sampling


def _validated(fields: dict[str, Any]) -> Job:
    """Encode and decode a job as a worker does, so that no job is sent that a worker would refuse at once."""
    raw = {name: _packed(name, value) for name, value in fields.items()}
    job = msgpack.Packer().pack_map_header(len(raw)) + b"".join(
        msgpack.packb(name) + value for name, value in raw.items()
    )
    try:
        return decode_job(job, max_bytes=len(job))  # the size limit is the queue's, only the server knows it
    except InvalidJob as error:
        message = _WIRE_NAMES.sub(lambda found: _ARGUMENTS[found[0]], str(error))
        raise InvalidJob(error.code, message, job_id=error.job_id) from None


_ARGUMENTS = {"`id`": "`job_id`", "deadline_ms": "deadline_s", "not_before_ms": "not_before_s"}
"""Name of a field on the wire -> name of the argument of `submit`."""
_WIRE_NAMES = re.compile("|".join(_ARGUMENTS))


def _packed(name: str, value: Any) -> bytes:
    try:
        return msgpack.packb(value, default=plain)
    except (TypeError, ValueError, OverflowError) as error:
        name = {"id": "job_id"}.get(name, name)
        raise InvalidJob(ErrorCode.INVALID_TYPE, f"`{name}` cannot be sent as msgpack: {error}") from None


def _milliseconds(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        in_seconds = seconds(name, value)
    except InvalidArgument as error:
        raise InvalidJob(ErrorCode.INVALID_TYPE, str(error)) from None
    if not 0 < in_seconds < 2**53 / 1000:
        raise InvalidJob(ErrorCode.INVALID_PARAMETER, f"{name} is a positive number, not {value}")
    return max(1, round(in_seconds * 1000))
