"""The asyncio client: submit jobs, follow their tokens, steer the queue. `producer.sync` is its sync face."""

from collections.abc import Iterable, Sequence
from typing import Any, Self

import msgpack
from redis import exceptions
from redis.asyncio import Redis

from ingine.errors import ClientError, InvalidJob, JobNotFound
from ingine.sampling_params import SamplingParams
from ingine.wire import (
    DEFAULT_RESULT_TTL_S,
    GROUP,
    JOB_FIELD,
    Job,
    JobStatus,
    Keys,
    Priority,
    TerminalEvent,
    decode_job,
    encode_event,
    encode_job,
)
from producer.connection import Server, connect
from producer.control import QueueControl, load_script
from producer.handle import AsyncJobHandle
from producer.results import JobInfo
from producer.settings import load_settings
from producer.streams import NO_SUCH_JOB, Streams
from producer.submission import Submission, build_submission

SUBMISSIONS_PER_TRIP = 256


class AsyncClient(QueueControl):
    """A producer's or consumer's view of one queue. For use in one event loop; share it between coroutines.

    All streams of a client share one pub/sub connection, all commands a pool of a few. Every method raises
    ServerUnavailable, with what to do about it, if the server cannot be reached or refuses the command.
    """

    def __init__(self, redis_url: str | None = None, *, queue: str | None = None, redis: Redis | None = None):
        """Does not connect yet. Raises ConfigError for a wrong setting.

        redis_url, queue: default to INGINE_REDIS_URL and INGINE_QUEUE, from the environment or `.env`.
        redis: a client of your own instead, e.g. from `Sentinel.master_for`; it stays yours to close.
        """
        settings = load_settings(redis_url=redis_url, queue=queue)
        self._owned_redis = connect(settings.redis_url) if redis is None else None
        redis = redis or self._owned_redis
        super().__init__(Server(redis), Keys(settings.queue))
        self._streams = Streams(self._server, self._keys)
        self._submit_script = load_script(redis, "submit")
        self._cancel_script = load_script(redis, "cancel")

    async def submit(
        self,
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
    ) -> AsyncJobHandle:
        """Submit one job: once this returns, the job ends in exactly one terminal event.

        prompt: text, or token ids. Or else messages: a chat, as [{"role": ..., "content": ...}, ...].
        sampling: a SamplingParams, or a dict with its fields; or its fields as keywords: `max_tokens=64`.
        priority: high, normal or low.
        deadline_s: seconds from submission; the job expires if it has not finished by then.
        not_before_s: seconds from submission; no worker begins it earlier.
        idempotency_key: a second submission with the same key within 24 h returns the first one's handle.
        reply_to: name of a replies stream that gets the terminal event too.
        metadata: comes back in the result. tenant, trace: for the worker's books and logs.
        model: refused by a worker that does not serve it. None: whatever it serves.
        stream: False if nobody follows token by token; spares the server the publishing.
        job_id: your own, else a random one.

        Raises, with nothing accepted: InvalidJob (its `code` says why), QueueFull, DuplicateJob (this job_id
        is taken), TypeError for an unknown keyword. A submission whose reply is lost is sent again, and known
        again by the server. After ServerUnavailable it may or may not have been accepted: submit again under
        the same job_id or idempotency_key to be sure that it runs once.
        """
        submission = build_submission(
            prompt,
            messages=messages,
            sampling=sampling,
            priority=priority,
            deadline_s=deadline_s,
            not_before_s=not_before_s,
            idempotency_key=idempotency_key,
            reply_to=reply_to,
            metadata=metadata,
            tenant=tenant,
            model=model,
            stream=stream,
            trace=trace,
            job_id=job_id,
            **sampling_fields,
        )
        touched, args = submission.script_call(self._keys)
        answer = await self._server.call(lambda: self._submit_script(keys=touched, args=args))
        return AsyncJobHandle(self, submission.accepted_id(answer, self._keys))

    async def submit_many(self, jobs: Iterable[dict[str, Any] | Job]) -> list[AsyncJobHandle]:
        """Submit many jobs in few round trips; each is a dict of `submit`'s arguments, or a Job.

        All are validated before the first is sent: an InvalidJob or TypeError with no attribute `accepted`
        means that nothing was. Each job is then accepted or refused for itself. After the first refusal
        (QueueFull, DuplicateJob, InvalidJob for one that is too large) or ServerUnavailable no further round
        trip is made, and it is raised, with the handles of the accepted jobs in its attribute `accepted`.
        """
        submissions = [
            Submission(job, encode_job(job)) if isinstance(job, Job) else build_submission(**job)
            for job in jobs
        ]
        accepted: list[AsyncJobHandle] = []
        for start in range(0, len(submissions), SUBMISSIONS_PER_TRIP):
            refusal = await self._submit_batch(submissions[start : start + SUBMISSIONS_PER_TRIP], accepted)
            if refusal:
                refusal.accepted = accepted
                raise refusal
        return accepted

    async def _submit_batch(
        self, submissions: list[Submission], accepted: list[AsyncJobHandle]
    ) -> ClientError | InvalidJob | None:
        """Appends to `accepted`. Returns the first refusal."""
        pipeline = self._server.redis.pipeline(transaction=False)
        for submission in submissions:
            touched, args = submission.script_call(self._keys)
            await self._submit_script(keys=touched, args=args, client=pipeline)
        try:
            answers = await self._server.call(lambda: pipeline.execute(raise_on_error=False))
        except ClientError as error:
            return error
        refusal = None
        for submission, answer in zip(submissions, answers, strict=True):
            try:
                if isinstance(answer, exceptions.RedisError):
                    raise self._server.unavailable(answer)
                accepted.append(AsyncJobHandle(self, submission.accepted_id(answer, self._keys)))
            except (ClientError, InvalidJob) as error:
                refusal = refusal or error
        return refusal

    def attach(self, job_id: str, from_position: int = 0) -> AsyncJobHandle:
        """A handle for a job that anyone has submitted. `from_position`: where its stream shall go on.

        Asks nothing of the server: an unknown id raises JobNotFound when the handle is used. A job that came
        by a bare XADD is unknown until a worker begins it.
        """
        return AsyncJobHandle(self, job_id, from_position)

    async def status(self, job_id: str) -> JobInfo:
        """How a job stands. Raises JobNotFound."""
        record = await self._server.call(lambda: self._server.redis.hgetall(self._keys.job(job_id)))
        if b"status" not in record:
            raise JobNotFound(NO_SUCH_JOB.format(job_id))
        return JobInfo.from_record(job_id, record)

    async def cancel(self, job_id: str) -> str:
        """Cancel a job. Raises JobNotFound.

        Returns `cancelled` if it had not begun, `requested` if its worker will stop it at its next step, or
        the status in which it had ended already.
        """
        info = await self.status(job_id)
        end = TerminalEvent(
            position=0,
            status=JobStatus.CANCELLED,
            job_id=job_id,
            finish_reason="abort",
            metadata=await self._queued_metadata(info),
        )
        keys = self._keys
        touched = [keys.job(job_id), keys.tokens(job_id), *keys.all_jobs, keys.delayed, keys.bytes]
        if info.reply_to:
            touched.append(keys.replies(info.reply_to))
        args = [
            GROUP,
            encode_event(end),
            keys.channel(job_id),
            DEFAULT_RESULT_TTL_S * 1000,
            int(info.reply_to is not None),
            keys.control,
            msgpack.packb({"command": "cancel", "job_id": job_id}),
            job_id,
        ]
        answer = await self._server.call(lambda: self._cancel_script(keys=touched, args=args))
        if answer == b"unknown":
            raise JobNotFound(NO_SUCH_JOB.format(job_id))
        return answer.decode()

    async def _queued_metadata(self, info: JobInfo) -> dict[str, Any] | None:
        """What the terminal event of a job that no worker has read shall bring back: only the job knows."""
        redis, keys = self._server.redis, self._keys
        if info.position > 0 or info.status not in (JobStatus.QUEUED, JobStatus.DELAYED):
            return None
        if info.status is JobStatus.DELAYED:
            raw = await self._server.call(lambda: redis.hget(keys.job(info.job_id), "raw"))
        else:
            jobs, entry = keys.jobs(info.priority), info.entry
            entries = await self._server.call(lambda: redis.xrange(jobs, min=entry, max=entry))
            raw = entries[0][1][JOB_FIELD.encode()] if entries else None
        if raw is None:  # it has got ahead of us, and the script will say so
            return None
        try:
            return decode_job(raw, max_bytes=len(raw)).metadata
        except InvalidJob:  # from a newer producer perhaps; no reason not to cancel it
            return None

    async def aclose(self) -> None:
        """End all streams of this client and close its connections. Jobs go on."""
        await self._streams.aclose()
        if self._owned_redis:
            await self._owned_redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_) -> None:
        await self.aclose()
