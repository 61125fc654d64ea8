"""The events of one job's log, for programs that pass them on in another form."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ingine.contract.events import Event
from ingine.producer.client import AsyncClient


async def follow_events(client: AsyncClient, job_id: str, position: int = 0) -> AsyncGenerator[Event, None]:
    """Yield the events of a job after `position` output tokens, each once and in order, up to and including
    the terminal event, which is always the last.

    Reads no further page of the log before the caller has taken the events of the last one. Close the
    generator if you leave it early. Raises JobNotFound, BadRecord and ServerUnavailable as
    `AsyncJobHandle.stream` does; a job that has failed raises nothing.
    """
    async with aclosing(client._session.streams.follow(job_id, position)) as events:
        async for event in events:
            yield event
