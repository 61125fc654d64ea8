"""List the jobs of a queue that wait or run, and cancel those that wait."""

import asyncio
from collections import Counter
from contextlib import aclosing
from datetime import timedelta

from redis.exceptions import RedisError

from ingine.connect.scripts import run_together
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.keys import Keys, Priority
from ingine.contract.record import JobStatus
from ingine.producer import arguments
from ingine.producer.cancelling import cancel_call
from ingine.producer.control import QueueControl
from ingine.producer.listing import WAITING, Found, Wanted, find_jobs
from ingine.producer.partitions import Partition
from ingine.producer.results import QueuedJob


class QueueJobs(QueueControl):
    async def jobs(
        self,
        *,
        status: JobStatus | str | None = None,
        priority: Priority | str | None = None,
        tenant: str | None = None,
        older_than_s: float | timedelta | None = None,
        limit: int = 100,
    ) -> list[QueuedJob]:
        """List jobs that wait (`queued`, `delayed`) or run, by priority and age. Delayed jobs are last.

        status, priority, tenant, older_than_s: list only such jobs. limit: most jobs to return.
        """
        wanted = Wanted.checked(status, priority, tenant, older_than_s)
        limit = arguments.integer("limit", limit, at_least=1)

        async def first_of(partition: Partition) -> list[QueuedJob]:
            jobs: list[QueuedJob] = []
            async with aclosing(find_jobs(partition, wanted)) as pages:
                async for page in pages:
                    jobs += [found.listed for found in page]
                    if len(jobs) >= limit:
                        break
            return jobs[:limit]

        parts = await asyncio.gather(*map(first_of, await self._partitions.latest()))
        return sorted((job for part in parts for job in part), key=_order)[:limit]

    async def purge_jobs(
        self,
        *,
        priority: Priority | str | None = None,
        tenant: str | None = None,
        older_than_s: float | timedelta | None = None,
    ) -> dict[str, int]:
        """Cancel all waiting jobs, or only those of a priority or tenant, or older than `older_than_s`.

        Each ends as `cancelled`, with its terminal event, as by `cancel`. Running jobs are not cancelled, nor
        are entries that cannot be read, which a worker will bury. Returns the number of jobs `cancelled`, and
        the number for which that was `requested`: they have tokens already, and end when a worker takes them.
        """
        wanted = Wanted.checked(None, priority, tenant, older_than_s)
        counts = Counter(cancelled=0, requested=0)
        for partition in await self._partitions.latest():
            async with aclosing(find_jobs(partition, wanted)) as pages:
                async for page in pages:
                    waiting = [found for found in page if found.listed.status in WAITING]
                    counts.update(await _cancel_all(partition, waiting))
        return {outcome: counts[outcome] for outcome in ("cancelled", "requested")}


def _order(job: QueuedJob) -> tuple:
    is_delayed = job.status is JobStatus.DELAYED
    return is_delayed, list(Priority).index(job.priority), job.submitted_at_ms or 0


async def _cancel_all(partition: Partition, page: list[Found]) -> list[str]:
    """Cancel these jobs, but for those that cannot be read. Returns the outcome of each.

    Raises ServerUnavailable if the server returned an error for one.
    """
    calls = [_call(partition.keys, found) for found in page if found.listed.job_id]
    if not calls:
        return []
    outcomes = await partition.call(lambda redis, _: run_together(redis, calls))
    for outcome in outcomes:
        if isinstance(outcome, RedisError):
            raise partition.server.unavailable(outcome)
    return outcomes


def _call(keys: Keys, found: Found) -> ScriptCall[str]:
    listed = found.listed
    return cancel_call(
        keys,
        listed.job_id,
        reply_to=found.reply_to,
        idempotency_key=found.idempotency_key,
        metadata=found.job.metadata if found.job else None,
        bare=None if found.has_record else (listed.entry, listed.priority),
    )
