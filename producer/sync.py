"""The blocking client. It runs the asyncio client on a thread of its own.

There is one implementation, because a second one over blocking sockets would have to repeat every rule about
logs, channels and reconnects. The price is a switch between threads for each call and each chunk, some 100
microseconds. A chunk is fetched when the caller asks for it, so a slow caller delays nothing else and loses
nothing.

Signatures and docstrings repeat the asyncio client's, because type checkers and editors read the source.
`tests/producer/test_faces.py` compares the two.
"""

import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sequence
from datetime import timedelta
from typing import Any, Self, TypeVar

from redis.asyncio import Redis

from ingine.contract.jobs import Job
from ingine.contract.keys import Priority
from ingine.errors import ClientError
from ingine.producer.client import NOT_FOR_SENDING, AsyncClient
from ingine.producer.handle import AsyncJobHandle
from ingine.producer.loop_thread import LoopThread
from ingine.producer.replies import Reply
from ingine.producer.results import Chunk, JobInfo, Result
from ingine.producer.sync_control import SyncQueueControl
from ingine.sampling_params import SamplingParams

T = TypeVar("T")

_starting = threading.Lock()
"""Held while a client starts its thread, or is closed."""


def _renew_lock() -> None:
    """Replace the lock in a forked child: a thread that the child does not have may have held it."""
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _iterate(
    client: "Client", items: AsyncGenerator[T, None], how: Callable[[Any], str]
) -> Generator[T, None, None]:
    """Iterate over an asynchronous iterator, fetching each item when the caller asks for it.

    how: returns the call that continues after a position, for the error in a forked child.
    """
    end = object()

    async def fetch() -> T | object:
        return await anext(items, end)

    thread = client._thread
    thread.iterated.add(items)
    try:
        while (item := thread.run(fetch())) is not end:
            yield item
            if not thread.is_here:
                go_on = how(item.position)
                raise ClientError(f"this was begun in another process: continue here with {go_on}")
    finally:
        thread.close_iterator(items)


class JobHandle:
    """A handle on one job. It holds an id and a position, and contacts the server only in its methods."""

    def __init__(self, client: "Client", handle: AsyncJobHandle):
        self._client, self._handle = client, handle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.job_id!r})"

    @property
    def job_id(self) -> str:
        return self._handle.job_id

    @property
    def from_position(self) -> int:
        return self._handle.from_position

    def stream(
        self, from_position: int | None = None, timeout: float | timedelta | None = None
    ) -> Generator[Chunk, None, None]:
        """The job's output after `from_position` output tokens, as it is made, each token exactly once.

        `from_position` (default: what the handle was attached with, else 0) is the `position` of the last
        chunk that you have. After any other number, too, the first chunk's token ids begin right after it,
        but its text and delta are those of the whole log entry, since they cannot be divided by token.

        In a job of several choices each chunk belongs to one, its `index`. A position counts the tokens of
        all of them.

        What was held back until the end comes as a last chunk without token ids. Then the iterator ends
        if the job finished, and raises JobFailed, JobCancelled or JobExpired otherwise. JobNotFound: the id
        is unknown. ServerUnavailable: the server was away for 30 s; the iterator waits out a shorter outage.
        BadRecord: no worker wrote the job's log or record.
        ResultTimeout: the job has not ended within `timeout` seconds of the first step, and goes on.
        """
        return _iterate(self._client, self._handle.stream(from_position, timeout), "stream({!r})".format)

    def result(self, timeout: float | timedelta | None = None, *, cancel: bool = False) -> Result:
        """Wait until the job has finished, and return its whole output, from the first token.

        Raises JobFailed, JobCancelled or JobExpired if it ended otherwise, JobNotFound for an unknown id,
        BadRecord for a log or a record that no worker wrote, and ResultTimeout after `timeout` seconds. After
        a timeout the job goes on, and you may call this again or cancel it; with `cancel=True` it is
        cancelled, unless it has just ended.
        """
        return self._client._thread.run(self._handle.result(timeout, cancel=cancel))

    def cancel(self) -> str:
        """See `cancel` of the client."""
        return self._client._thread.run(self._handle.cancel())

    def status(self) -> JobInfo:
        """See `status` of the client."""
        return self._client._thread.run(self._handle.status())


class Client(SyncQueueControl):
    """A producer's or consumer's client for one queue. Threads can share it, and so can forked processes,
    each of which gets connections of its own.

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
        redis: an asyncio client of your own instead, for all partitions, which nothing else uses, in this
        process alone; closing it is up to you.
        require_worker: refuse submissions with NoWorker while no worker serves the queue.
        """
        self._client = AsyncClient(redis_url, queue=queue, redis=redis, require_worker=require_worker)
        self._started: LoopThread | None = None
        self._closed = False

    @property
    def _thread(self) -> LoopThread:
        """This process's thread, started at the first call. Raises ClientError if the client is closed."""
        with _starting:
            if self._closed:
                raise ClientError("the client is closed")
            if self._started is None or not self._started.is_here:
                self._started = LoopThread()
            return self._started

    def submit(
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
    ) -> JobHandle:
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
        handle = self._thread.run(
            self._client.submit(
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
        )
        return JobHandle(self, handle)

    def submit_many(self, jobs: Iterable[dict[str, Any] | Job]) -> list[JobHandle]:
        """Submit many jobs in few round trips; each is a dict of `submit`'s arguments, or a Job.

        All jobs are validated before the first is sent: after InvalidArgument, or an InvalidJob whose
        `accepted` is empty, nothing was sent. Each job is then accepted or refused on its own. The first
        refusal (QueueFull, DuplicateJob, InvalidJob for a job that is too large) or ServerUnavailable ends
        the round trips and is raised, with the handles of the accepted jobs in its attribute `accepted`.
        """
        try:
            handles = self._thread.run(self._client.submit_many(jobs))
        except Exception as error:
            if hasattr(error, "accepted"):
                error.accepted = [JobHandle(self, handle) for handle in error.accepted]
            raise
        return [JobHandle(self, handle) for handle in handles]

    def attach(self, job_id: str, from_position: int = 0) -> JobHandle:
        """Return a handle on a job, whoever submitted it. `from_position`: where its stream continues.

        Sends nothing to the server: an unknown id raises JobNotFound when the handle is used. A job submitted
        by a bare XADD is unknown until a worker begins it.
        """
        return JobHandle(self, self._client.attach(job_id, from_position))

    def replies(self, name: str, position: str = "") -> Generator[Reply, None, None]:
        """Iterate over the ends of all jobs submitted with `reply_to=name`, past and future, without end.

        position: the position of the last reply that you have processed; empty for all that are still kept.
        A reply is kept for as long as its job's result. Replies of one partition come in the order in which
        the jobs ended.

        Raises ServerUnavailable as streams do, ClientError when the client is closed or the number of
        partitions changes, and InvalidArgument for a position from before such a change.
        """
        return _iterate(self, self._client.replies(name, position), f"replies({name!r}, {{!r}})".format)

    def status(self, job_id: str) -> JobInfo:
        """Return the state of a job. Expires the job if its deadline has passed and no worker runs it.

        Raises JobNotFound, and BadRecord for a record that no worker wrote.
        """
        return self._thread.run(self._client.status(job_id))

    def cancel(self, job_id: str) -> str:
        """Cancel a job. Raises JobNotFound.

        Returns `cancelled` if the job had not begun, `requested` if its worker will stop it at the next step,
        or the status with which the job had already ended.
        """
        return self._thread.run(self._client.cancel(job_id))

    def close(self) -> None:
        """End all streams of this client and close its connections. Jobs go on. Safe to call twice."""
        with _starting:
            self._closed, thread, self._started = True, self._started, None
        if thread and thread.is_here:
            thread.run(self._client.aclose())
            thread.close()

    def __reduce__(self):
        raise TypeError(NOT_FOR_SENDING)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()
