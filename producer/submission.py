"""From `submit`'s arguments to a valid job, and from the script's answer to an error. No I/O here."""

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack

from ingine.errors import ClientError, DuplicateJob, ErrorCode, InvalidJob, QueueFull, RateLimited
from ingine.keys import Keys, Priority, partition_of
from ingine.sampling_params import NEUTRAL_PARAMS, SamplingParams
from ingine.wire import (
    DEFAULT_MAX_JOB_BYTES,
    DEFAULT_MAX_QUEUED_BYTES,
    DEFAULT_MAX_QUEUED_JOBS,
    MAX_JOB_BYTES,
    Job,
    decode_job,
    encode_job,
    token_cost,
)

MAX_IDEMPOTENCY_KEY = 256
BYTES_PER_TOKEN = 4


class Repartitioned(Exception):
    """The queue has another number of partitions by now: nothing was accepted, the job belongs elsewhere."""

    def __init__(self, num_partitions: int):
        super().__init__(num_partitions)
        self.num_partitions = num_partitions


@dataclass(frozen=True, slots=True)
class Submission:
    """One job on its way, and the nonce by which the server knows it again if it is sent twice."""

    job: Job
    raw: bytes
    idempotency_key: str | None = None
    chosen_id: bool = True
    """The caller named the job; else any other random id will do as well."""
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex)

    def placed(self, num_partitions: int) -> "Submission":
        """The same in the partition of its idempotency key, by another id: only there is the key known.

        Raises InvalidJob where both are given, and there is more than one partition.
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
        """Tokens that the job may take, for fair shares: a guess, since texts are not tokenised."""
        job = self.job
        prompt = job.prompt or "".join(message.content for message in job.messages or ())
        num_prompt_tokens = (
            len(prompt.encode()) // BYTES_PER_TOKEN if isinstance(prompt, str) else len(prompt)
        )
        return token_cost(num_prompt_tokens, job.sampling.max_tokens)

    def script_call(
        self, keys: Keys, num_partitions: int = 1, same: str | None = None
    ) -> tuple[list[str], list[Any]]:
        """KEYS and ARGV of `scripts/submit.lua`. `same`: the job that it named when this was sent before."""
        job = self.job
        touched = [
            *(keys.job(job.id), keys.settings, keys.jobs(job.priority), *keys.all_jobs),
            *(keys.delayed, keys.bytes, keys.rate(job.tenant or ""), keys.deadlines),
            *(keys.idem(self.idempotency_key or ""), *([] if same is None else [keys.job(same)])),
        ]
        return touched, [
            job.id,
            self.raw,
            str(job.priority),
            self.nonce,
            job.reply_to or "",
            self.idempotency_key or "",
            DEFAULT_MAX_QUEUED_JOBS,
            DEFAULT_MAX_JOB_BYTES,
            DEFAULT_MAX_QUEUED_BYTES,
            num_partitions,
            job.tenant or "",
            self.cost,
            job.not_before_ms or 0,
            MAX_JOB_BYTES,
            job.deadline_ms or 0,
            same or "",
        ]

    def accepted_id(self, answer: Sequence[bytes], keys: Keys) -> str:
        """The id of the job that the script accepted, or knew by its idempotency key. Raises its refusal."""
        verdict, detail = (part.decode() for part in answer)
        match verdict:
            case "accepted" | "same":
                return detail
            case "partitions":
                raise Repartitioned(int(detail))
            case "duplicate":
                raise DuplicateJob(
                    f"job {self.job.id} exists already: attach to it, or submit under another job_id"
                )
            case "full":
                raise QueueFull(
                    f"queue {keys.queue!r} is at its limit of {detail} jobs, nothing was accepted: "
                    "try again later, start more workers, or raise max_jobs"
                )
            case "full_bytes":
                raise QueueFull(
                    f"queue {keys.queue!r} is at its limit of {detail} bytes, nothing was accepted: "
                    "try again later, start more workers, or raise max_bytes"
                )
            case "rate":
                raise RateLimited(
                    f"tenant {self.job.tenant or ''!r} submits faster than queue {keys.queue!r} allows, "
                    f"nothing was accepted: try again in {detail} ms, or raise max_jobs_per_s",
                    retry_after_s=int(detail) / 1000,
                )
            case "too_large":
                raise InvalidJob(
                    ErrorCode.JOB_TOO_LARGE,
                    f"the job has {len(self.raw)} bytes, the limit of queue {keys.queue!r} is {detail}",
                    job_id=self.job.id,
                )
        raise ClientError(f"the submit script answered {verdict!r}")


def build_submission(
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Sequence[dict[str, str]] | None = None,
    sampling: SamplingParams | dict[str, Any] | None = None,
    priority: Priority | str = Priority.NORMAL,
    deadline_s: float | None = None,
    not_before_s: float | None = None,
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
    """See `AsyncClient.submit`. Raises InvalidJob, and TypeError for a keyword that nobody knows."""
    if unknown := sampling_fields.keys() - SamplingParams.model_fields.keys() - NEUTRAL_PARAMS.keys():
        raise TypeError(f"submit() has no argument {sorted(unknown)[0]!r}, nor is it a sampling parameter")
    if sampling is not None and sampling_fields:
        raise TypeError(f"give {', '.join(sorted(sampling_fields))} inside sampling=, or leave sampling= out")
    if isinstance(sampling, SamplingParams):
        sampling = sampling.given()
    if idempotency_key is not None and not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidJob(
            ErrorCode.INVALID_PARAMETER, f"an idempotency_key has 1 to {MAX_IDEMPOTENCY_KEY} characters"
        )
    fields = {
        "id": uuid.uuid4().hex if job_id is None else job_id,
        "prompt": prompt,
        "messages": messages,
        "sampling": sampling or sampling_fields,
        "priority": priority,
        "tenant": tenant,
        "deadline_ms": None if deadline_s is None else _milliseconds("deadline_s", deadline_s),
        "not_before_ms": None if not_before_s is None else _milliseconds("not_before_s", not_before_s),
        "stream": stream,
        "reply_to": reply_to,
        "model": model,
        "metadata": metadata,
        "trace": trace,
    }
    job = _through_the_door({name: value for name, value in fields.items() if value is not None})
    return Submission(job, encode_job(job), idempotency_key, chosen_id=job_id is not None)


def _through_the_door(fields: dict[str, Any]) -> Job:
    """What the worker will do with it: so nothing that it would refuse on sight is ever sent."""
    try:
        raw = msgpack.packb(fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidJob(ErrorCode.INVALID_TYPE, f"cannot be sent as msgpack: {error}") from None
    return decode_job(raw, max_bytes=len(raw))  # the size limit is the queue's, only the server knows it


def _milliseconds(name: str, seconds: float) -> int:
    if not math.isfinite(seconds) or seconds <= 0:
        raise InvalidJob(ErrorCode.INVALID_PARAMETER, f"{name} is a positive number, not {seconds}")
    return max(1, round(seconds * 1000))
