"""The client for code without an event loop. It is the asyncio client, run on a thread of its own.

One implementation, two faces: a second one over blocking sockets would have to repeat every rule about logs,
channels and reconnects. The price is a hop between threads a call and a chunk, some 100 microseconds. A chunk
is fetched when the caller asks for it, so a slow caller slows nothing else down and loses nothing.

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
"""Held while a client starts its thread."""


def _renew_lock() -> None:
    """In a forked child: the lock may have been held by a thread that the child does not have."""
    global _starting
    _starting = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _iterate(
    client: "Client", items: AsyncGenerator[T, None], how: Callable[[Any], str]
) -> Generator[T, None, None]:
    """What an asynchronous iterator gives, fetched one by one as the caller asks for it.

    `how`: the call that goes on after a position, for who goes on with this iterator in a forked child.
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
                raise ClientError(f"this was begun in another process: go on here with {how(item.position)}")
    finally:
        thread.close_iterator(items)


class JobHandle:
    """One job, from the outside. Cheap: it holds an id and a position, and talks to the server when asked."""

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
        chunk that you have. With another number the first chunk's token ids begin right after it, too, but
        its text is that of the whole log entry, since text is not divisible by token.

        Text that was held back until the end comes as a last chunk without token ids. Then the iterator ends
        if the job finished, and raises JobFailed, JobCancelled or JobExpired otherwise. JobNotFound: the id
        is unknown. ServerUnavailable: the server stayed away for 30 s; a shorter outage is outlasted.
        BadRecord: its log or its record is not what workers write.
        ResultTimeout: it has not ended within `timeout` seconds of the first step; the job goes on.
        """
        return _iterate(self._client, self._handle.stream(from_position, timeout), "stream({!r})".format)

    def result(self, timeout: float | timedelta | None = None, *, cancel: bool = False) -> Result:
        """The whole output, from its first token, once the job has finished.

        Raises JobFailed, JobCancelled or JobExpired if it ended otherwise, JobNotFound for an unknown id,
        BadRecord for a log or a record that no worker wrote, and ResultTimeout after `timeout` seconds. The
        job goes on then, ask again or cancel it; or it is cancelled with `cancel=True`, unless it has just
        ended.
        """
        return self._client._thread.run(self._handle.result(timeout, cancel=cancel))

    def cancel(self) -> str:
        """See `cancel` of the client."""
        return self._client._thread.run(self._handle.cancel())

    def status(self) -> JobInfo:
        """See `status` of the client."""
        return self._client._thread.run(self._handle.status())


class Client(SyncQueueControl):
    """A producer's or consumer's view of one queue. Threads share it, and processes that are forked: each of
    them has connections of its own.

    All its streams on one server share a pub/sub connection, all commands there a pool of a few. Every method
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
        redis: an asyncio client of your own instead, for all partitions, used by nobody else and in this
        process alone; it stays yours to close.
        require_worker: refuse submissions with NoWorker while no worker serves the queue.
        """
        self._client = AsyncClient(redis_url, queue=queue, redis=redis, require_worker=require_worker)
        self._started: LoopThread | None = None
        self._closed = False

    @property
    def _thread(self) -> LoopThread:
        """This process's, from the first call on. Raises ClientError if the client is closed."""
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
        messages: Sequence[dict[str, str]] | None = None,
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

        prompt: text, or token ids. Or else messages: a chat, as [{"role": ..., "content": ...}, ...].
        sampling: a SamplingParams, or a dict with its fields; or its fields as keywords: `max_tokens=64`.
        What is not given is the model's to decide (its generation_config.json), and the output as long as
        its length leaves.
        priority: high, normal or low.
        deadline_s: seconds (or a timedelta) from submission; the job expires if it has not finished by then.
        not_before_s: seconds (or a timedelta) from submission; no worker begins it earlier.
        idempotency_key: a second submission with the same key returns the first one's handle, for as long as
        the first job, or its result, is there.
        reply_to: name of a replies stream that gets the terminal event too.
        metadata: comes back in the result. tenant, trace: for the worker's books and logs.
        model: refused by a worker that does not serve it. None: whatever it serves.
        stream: False if nobody follows token by token; spares the server the publishing.
        job_id: your own, else a random one.

        Raises, with nothing accepted: InvalidJob (its `code` says why), QueueFull, DuplicateJob (this job_id
        is taken), InvalidArgument (a TypeError) for an unknown keyword; all of them are ClientErrors. A
        submission whose reply is lost is sent again, and known again by the server. After ServerUnavailable
        it may or may not have been accepted: submit again under the same job_id or idempotency_key to be sure
        that it runs once.
        """
        handle = self._thread.run(
            self._client.submit(
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
        )
        return JobHandle(self, handle)

    def submit_many(self, jobs: Iterable[dict[str, Any] | Job]) -> list[JobHandle]:
        """Submit many jobs in few round trips; each is a dict of `submit`'s arguments, or a Job.

        All are validated before the first is sent: after InvalidArgument, or an InvalidJob whose `accepted`
        is empty, nothing was. Each job is then accepted or refused for itself. After the first refusal
        (QueueFull, DuplicateJob, InvalidJob for one that is too large) or ServerUnavailable no further round
        trip is made, and it is raised, with the handles of the accepted jobs in its attribute `accepted`.
        """
        try:
            handles = self._thread.run(self._client.submit_many(jobs))
        except Exception as error:
            if hasattr(error, "accepted"):
                error.accepted = [JobHandle(self, handle) for handle in error.accepted]
            raise
        return [JobHandle(self, handle) for handle in handles]

    def attach(self, job_id: str, from_position: int = 0) -> JobHandle:
        """A handle for a job that anyone has submitted. `from_position`: where its stream shall go on.

        Asks nothing of the server: an unknown id raises JobNotFound when the handle is used. A job that came
        by a bare XADD is unknown until a worker begins it.
        """
        return JobHandle(self, self._client.attach(job_id, from_position))

    def replies(self, name: str, position: str = "") -> Generator[Reply, None, None]:
        """How the jobs submitted with `reply_to=name` have ended, and end from now on. Never ends by itself.

        position: of the last reply that you have dealt with; from the first one that is still there if empty.
        They stay for as long as a job's result does. In the order of their ends, in each partition.

        Raises ServerUnavailable as streams do, ClientError when the client is closed or the number of
        partitions changes, and InvalidArgument for a position from before it did.
        """
        return _iterate(self, self._client.replies(name, position), f"replies({name!r}, {{!r}})".format)

    def status(self, job_id: str) -> JobInfo:
        """How a job stands. Ends it if its deadline has passed and nobody runs it.

        Raises JobNotFound, and BadRecord for a record that no worker wrote.
        """
        return self._thread.run(self._client.status(job_id))

    def cancel(self, job_id: str) -> str:
        """Cancel a job. Raises JobNotFound.

        Returns `cancelled` if it had not begun, `requested` if its worker will stop it at its next step, or
        the status in which it had ended already.
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
