"""A handle on one job: its stream, its result, its status."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import timedelta
from typing import Any, Protocol

from ingine.contract.events import Event, TokensEvent
from ingine.errors import BadRecord, ResultTimeout
from ingine.producer import arguments
from ingine.producer.choices import LogWentBack, choices_of, last_chunks
from ingine.producer.results import Chunk, JobInfo, Result, raise_unless_finished
from ingine.producer.sessions import Session


class Jobs(Protocol):
    """The part of a client that its handles use."""

    @property
    def _session(self) -> Session: ...
    async def cancel(self, job_id: str) -> str: ...
    async def status(self, job_id: str) -> JobInfo: ...


MAX_READS = 10
"""How often `result` reads one log from its first token: a server that crashes may lose what was read."""


class AsyncJobHandle:
    """A handle on one job. It holds an id and a position, and contacts the server only in its methods."""

    def __init__(self, client: Jobs, job_id: str, from_position: int = 0):
        self._client = client
        self.job_id = job_id
        self.from_position = from_position

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.job_id!r})"

    async def stream(
        self,
        from_position: int | None = None,
        timeout: float | timedelta | None = None,  # noqa: ASYNC109
    ) -> AsyncGenerator[Chunk, None]:
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
        position = self.from_position if from_position is None else from_position
        session, is_parsed = self._client._session, False
        async with aclosing(self._events(position, timeout, _deadline(timeout))) as events:
            async for event in events:
                if isinstance(event, TokensEvent):
                    is_parsed = is_parsed or event.delta is not None
                    yield Chunk(
                        event.text,
                        event.token_ids,
                        event.position,
                        event.logprobs,
                        event.index,
                        event.choice_position,
                        event.finish_reason,
                        event.prompt_logprobs,
                        event.delta,
                    )
                    session.home.check("this stream", f"stream({event.position})")
                else:
                    for chunk in last_chunks(event, is_parsed=is_parsed):
                        yield chunk
                    raise_unless_finished(event)

    async def result(self, timeout: float | timedelta | None = None, *, cancel: bool = False) -> Result:  # noqa: ASYNC109
        """Wait until the job has finished, and return its whole output, from the first token.

        Raises JobFailed, JobCancelled or JobExpired if it ended otherwise, JobNotFound for an unknown id,
        BadRecord for a log or a record that no worker wrote, and ResultTimeout after `timeout` seconds. After
        a timeout the job goes on, and you may call this again or cancel it; with `cancel=True` it is
        cancelled, unless it has just ended.
        """
        try:
            return await self._whole(timeout)
        except ResultTimeout:
            if not cancel:
                raise
        if await self.cancel() in ("cancelled", "requested"):
            raise ResultTimeout(f"job {self.job_id} has not ended within {timeout} s, and was cancelled")
        return await self.result()

    async def _whole(self, timeout: Any) -> Result:  # noqa: ASYNC109
        """The result. The log is read from the first token again if the server has lost what was read."""
        deadline = _deadline(timeout)
        for _ in range(MAX_READS):
            try:
                async with aclosing(self._events(0, timeout, deadline, at_end=True)) as events:
                    return _result([event async for event in events])
            except LogWentBack:
                continue
        raise BadRecord(f"the log of job {self.job_id} went back {MAX_READS} times while it was read")

    async def _events(
        self,
        position: int,
        timeout: Any,  # noqa: ASYNC109
        deadline: float | None,
        *,
        at_end: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Events after `position`. deadline: by the loop's clock; `timeout` is only quoted in the error."""
        streams = self._client._session.streams
        async with aclosing(streams.follow(self.job_id, position, at_end=at_end)) as events:
            while True:
                try:
                    if deadline is None:  # entering a timeout costs more than to yield a token
                        event = await anext(events, None)
                    else:
                        async with asyncio.timeout_at(deadline):
                            event = await anext(events, None)
                except TimeoutError:
                    raise ResultTimeout(
                        f"job {self.job_id} has not ended within {timeout} s, and goes on: ask again, or "
                        "cancel it"
                    ) from None
                if event is None:
                    return
                yield event

    async def cancel(self) -> str:
        """See `cancel` of the client."""
        return await self._client.cancel(self.job_id)

    async def status(self) -> JobInfo:
        """See `status` of the client."""
        return await self._client.status(self.job_id)


def _deadline(timeout: Any) -> float | None:
    """When the timeout ends, by the running loop's clock. Raises InvalidArgument."""
    limit_s = arguments.timeout(timeout)
    return None if limit_s is None else asyncio.get_running_loop().time() + limit_s


def _result(events: list[Event]) -> Result:
    """Join all events of one job; the last one is its terminal event."""
    *tokens, end = events
    raise_unless_finished(end)
    choices = choices_of(tokens, end)
    return Result(
        job_id=end.job_id,
        text=choices[0].text,
        token_ids=choices[0].token_ids,
        finish_reason=end.finish_reason,
        usage=end.usage,
        timings=end.timings,
        metadata=end.metadata,
        status=end.status,
        logprobs=choices[0].logprobs,
        prompt_logprobs=next((e.prompt_logprobs for e in tokens if e.prompt_logprobs is not None), None),
        stop_reason=choices[0].stop_reason,
        choices=choices,
    )
