"""The asyncio client: submit jobs, follow their tokens, control the queue. `sync` has the blocking client."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing, suppress
from datetime import timedelta
from functools import partial
from typing import Any, Self

from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.contract.expiry import expire
from ingine.contract.jobs import DEFAULT_RESULT_TTL_S, Job, decode_job
from ingine.contract.keys import JOB_FIELD, Keys, Priority
from ingine.contract.record import JobStatus
from ingine.errors import BadRecord, InvalidArgument, InvalidJob, JobNotFound, ServerUnavailable
from ingine.producer import arguments
from ingine.producer.cancelling import cancel_call
from ingine.producer.handle import AsyncJobHandle
from ingine.producer.partitions import MAX_MOVES, Partition
from ingine.producer.queue_jobs import QueueJobs
from ingine.producer.replies import Reply
from ingine.producer.results import JobInfo, of_another_type
from ingine.producer.sessions import Sessions
from ingine.producer.settings import load_settings
from ingine.producer.streams import NO_SUCH_JOB
from ingine.producer.submission import build_submission, submission_of
from ingine.sampling_params import SamplingParams

NOT_FOR_SENDING = "a client cannot be sent to another process: make one in each process, and send job ids"


class AsyncClient(QueueJobs):
    """A producer's or consumer's client for one queue. Coroutines can share it; each event loop and each
    forked process gets connections of its own.

    All streams on one server share a pub/sub connection, and all commands share a small pool. Every method
    raises ServerUnavailable, with what to do about it, if a server cannot be reached or refuses the command.
    """

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        queue: str | None = None,
        redis: Redis | None = None,
        require_worker: bool = False,
    ):
        """Does not connect yet. Raises ConfigError for a wrong setting.

        redis_url, queue: default to INGINE_REDIS_URL and INGINE_QUEUE, from the environment or `.env`.
        redis: a client of your own instead, for all partitions and one event loop; closing it is up to you.
        require_worker: refuse submissions with NoWorker while no worker serves the queue.
        """
        settings = load_settings(redis_url=redis_url, queue=queue)
        super().__init__(settings.queue, Sessions(settings, redis, require_worker=require_worker))

    async def submit(
        self,
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
    ) -> AsyncJobHandle:
        """Submit one job: once this returns, the job ends in exactly one terminal event.

        prompt: text, or token ids. Or else messages: a chat as OpenAI has it, with text parts, tool calls and
        their results: [{"role": ..., "content": ...}, ...].
        tools, tool_choice, parallel_tool_calls: the functions that the model may call, as OpenAI has them.
        chat_template_kwargs, add_generation_prompt, continue_final_message: as in transformers'
        `apply_chat_template`, for messages.
        allow_special_tokens: special tokens in the messages' texts are special tokens, not text. Leave it
        False for texts that others have written.
        sampling: a SamplingParams, or a dict with its fields; or its fields as keywords: `max_tokens=64`.
        Fields that are not given come from the model's generation_config.json; without `max_tokens` the
        output may fill the rest of the model's length.
        priority: high, normal or low.
        deadline_s: seconds (or a timedelta) from submission; the job expires if it has not finished by then.
        not_before_s: seconds (or a timedelta) from submission; no worker starts the job earlier.
        idempotency_key: a second submission with the same key returns the first one's handle, for as long as
        the first job, or its result, is there.
        reply_to: name of a replies stream that gets the terminal event too.
        metadata: returned in the result. tenant: the account for fair shares and rate limits. trace: an id
        for the worker's logs.
        model: a worker that does not serve this model refuses the job. None: any model.
        stream: False if no consumer follows token by token; saves the server the publishing.
        job_id: an id of your own. None: a random one.

        Raises, with nothing accepted: InvalidJob (its `code` says why), QueueFull, DuplicateJob (this job_id
        is taken), InvalidArgument (a TypeError) for an unknown keyword; all of them are ClientErrors. If the
        reply to a submission is lost, the client sends it again, and the server recognises it. After
        ServerUnavailable the job may or may not have been accepted: submit it again under the same job_id or
        idempotency_key to be sure that it runs once.
        """
        submission = build_submission(
            prompt,
            messages=messages,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            allow_special_tokens=allow_special_tokens,
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
        return AsyncJobHandle(self, await self._session.submitter.submit(submission))

    async def submit_many(self, jobs: Iterable[dict[str, Any] | Job]) -> list[AsyncJobHandle]:
        """Submit many jobs in few round trips; each is a dict of `submit`'s arguments, or a Job.

        All jobs are validated before the first is sent: after InvalidArgument, or an InvalidJob whose
        `accepted` is empty, nothing was sent. Each job is then accepted or refused on its own. The first
        refusal (QueueFull, DuplicateJob, InvalidJob for a job that is too large) or ServerUnavailable ends
        the round trips and is raised, with the handles of the accepted jobs in its attribute `accepted`.
        """
        if not isinstance(jobs, Iterable):
            raise InvalidArgument(f"submit_many() takes a list of jobs, not a {type(jobs).__name__}")
        submissions = [submission_of(job) for job in jobs]
        job_ids, refusal = await self._session.submitter.submit_many(submissions)
        accepted = [AsyncJobHandle(self, job_id) for job_id in job_ids]
        if refusal:
            refusal.accepted = accepted
            raise refusal
        return accepted

    def attach(self, job_id: str, from_position: int = 0) -> AsyncJobHandle:
        """Return a handle on a job, whoever submitted it. `from_position`: where its stream continues.

        Sends nothing to the server: an unknown id raises JobNotFound when the handle is used. A job submitted
        by a bare XADD is unknown until a worker begins it.
        """
        from_position = arguments.integer("from_position", from_position, at_least=0)
        return AsyncJobHandle(self, arguments.job_id(job_id), from_position)

    async def replies(self, name: str, position: str = "") -> AsyncGenerator[Reply, None]:
        """Iterate over the ends of all jobs submitted with `reply_to=name`, past and future, without end.

        position: the position of the last reply that you have processed; empty for all that are still kept.
        A reply is kept for as long as its job's result. Replies of one partition come in the order in which
        the jobs ended.

        Raises ServerUnavailable as streams do, ClientError when the client is closed or the number of
        partitions changes, and InvalidArgument for a position from before such a change.
        """
        session = self._session
        name, position = arguments.text("name", name), arguments.text("position", position)
        async with aclosing(session.replies.follow(name, position)) as replies:
            async for reply in replies:
                yield reply
                session.home.check("this iterator", f"replies({name!r}, {reply.position!r})")

    async def status(self, job_id: str) -> JobInfo:
        """Return the state of a job. Expires the job if its deadline has passed and no worker runs it.

        Raises JobNotFound, and BadRecord for a record that no worker wrote.
        """
        partition, info = await self._find(job_id)
        if info.deadline_at_ms is not None and not info.status.terminal:
            with suppress(ServerUnavailable, BadRecord):  # a read-only user gets the state as it is
                await partition.call(partial(_expire_if_due, info=info))
                partition, info = await self._find(job_id)
        return info

    async def _find(self, job_id: str) -> tuple[Partition, JobInfo]:
        """The partition and the state of a job. Raises JobNotFound and BadRecord."""
        job_id = arguments.job_id(job_id)
        for _ in range(MAX_MOVES):
            partition = await self._partitions.of(job_id)
            try:
                record = await partition.call(lambda redis, keys: redis.hgetall(keys.job(job_id)))
            except ServerUnavailable as error:
                raise of_another_type(job_id, error.__cause__) or error from error.__cause__
            if b"status" in record:
                return partition, JobInfo.from_record(job_id, record)
            if not await self._partitions.moved(job_id, partition):
                raise JobNotFound(NO_SUCH_JOB.format(job_id))
        raise self._partitions.unsettled()

    async def cancel(self, job_id: str) -> str:
        """Cancel a job. Raises JobNotFound.

        Returns `cancelled` if the job had not begun, `requested` if its worker will stop it at the next step,
        or the status with which the job had already ended.
        """
        partition, info = await self._find(job_id)
        call = cancel_call(
            partition.keys,
            job_id,
            reply_to=info.reply_to,
            idempotency_key=info.idempotency_key,
            metadata=await _metadata_before_it_began(partition, info),
        )
        outcome = await partition.call(lambda redis, _: run_script(redis, call))
        if outcome == "unknown":
            raise JobNotFound(NO_SUCH_JOB.format(job_id))
        return outcome

    async def aclose(self) -> None:
        """End all streams of this client and close its connections. Jobs go on. Safe to call twice."""
        await self._sessions.aclose()

    def __reduce__(self):
        raise TypeError(NOT_FOR_SENDING)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_) -> None:
        await self.aclose()


async def _expire_if_due(redis: Redis, keys: Keys, info: JobInfo) -> None:
    now_s, _ = await redis.time()
    if info.deadline_at_ms <= now_s * 1000:
        await expire(redis, keys, [info.job_id], result_ttl_s=DEFAULT_RESULT_TTL_S)


async def _metadata_before_it_began(partition: Partition, info: JobInfo) -> dict[str, Any] | None:
    """The metadata for the terminal event of a job that no worker has read. Only the job's entry holds it."""
    if info.position > 0 or info.status not in (JobStatus.QUEUED, JobStatus.DELAYED):
        return None
    if info.status is JobStatus.QUEUED and (info.priority not in list(Priority) or not info.entry):
        raise BadRecord(f"the record of job {info.job_id} is damaged: it does not say where the job waits")
    if info.status is JobStatus.DELAYED:
        raw = await partition.call(lambda redis, keys: redis.hget(keys.job(info.job_id), "raw"))
    else:
        entries = await partition.call(
            lambda redis, keys: redis.xrange(keys.jobs(info.priority), min=info.entry, max=info.entry)
        )
        raw = entries[0][1].get(JOB_FIELD.encode()) if entries else None
    if raw is None:  # the job has moved on meanwhile, and the script will say so
        return None
    try:
        return decode_job(raw, max_bytes=len(raw)).metadata
    except InvalidJob:  # perhaps from a newer producer; it can be cancelled all the same
        return None
