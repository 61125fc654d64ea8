"""The blocking client's methods for a queue as a whole: inspect it, control it, handle its dead letters."""

from collections.abc import Mapping, Sequence
from datetime import timedelta

from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.producer.client import AsyncClient
from ingine.producer.loop_thread import LoopThread
from ingine.producer.results import DeadLetter, QueuedJob, QueueInfo


class SyncQueueControl:
    """Base of `Client`. Each method runs the AsyncClient method of the same name on the client's thread."""

    _client: AsyncClient

    @property
    def _thread(self) -> LoopThread:
        raise NotImplementedError

    def queue_info(self) -> QueueInfo:
        """Return depth by priority, limits, switches, workers and dead letters.

        Each partition is read at one moment, but not all at the same one.
        """
        return self._thread.run(self._client.queue_info())

    def jobs(
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
        return self._thread.run(
            self._client.jobs(
                status=status, priority=priority, tenant=tenant, older_than_s=older_than_s, limit=limit
            )
        )

    def purge_jobs(
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
        return self._thread.run(
            self._client.purge_jobs(priority=priority, tenant=tenant, older_than_s=older_than_s)
        )

    def pause(self) -> None:
        """Make workers take no further jobs. Running jobs go on, and `submit` still accepts."""
        self._thread.run(self._client.pause())

    def resume(self) -> None:
        """Undo `pause`."""
        self._thread.run(self._client.resume())

    def drain(self, worker_id: str) -> None:
        """Make one worker hand its jobs over and exit, or all living workers of one name.

        A worker that starts later under the same name is not affected. Raises ClientError if no such worker
        is alive.
        """
        self._thread.run(self._client.drain(worker_id))

    def set_limits(
        self,
        *,
        max_jobs: int | None = None,
        max_job_bytes: int | str | None = None,
        max_bytes: int | str | None = None,
        max_jobs_per_s: float | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Set the limits of each partition, from now on. None leaves a limit unchanged.

        max_jobs, max_bytes: number and bytes of all jobs that wait or run. max_job_bytes: bytes of one job.
        Bytes may be text such as "2GiB".
        max_jobs_per_s: submissions of each tenant; 0 removes the limit.
        weights: tenant -> its share of the work while others wait too; other tenants have weight 1.

        Raises InvalidArgument for a value that is no valid limit.
        """
        self._thread.run(
            self._client.set_limits(
                max_jobs=max_jobs,
                max_job_bytes=max_job_bytes,
                max_bytes=max_bytes,
                max_jobs_per_s=max_jobs_per_s,
                weights=weights,
            )
        )

    def set_partitions(self, number: int) -> None:
        """Spread the queue over `number` partitions, each with the limits of the queue.

        Raises InvalidArgument below 1 and above 64, and ClientError unless the queue is empty: no job waits
        or runs, and there are no dead letters. Results of jobs that have ended can no longer be read.
        Workers exit, and have to be started again. If this fails halfway, `submit` is refused until it is
        called again.
        """
        self._thread.run(self._client.set_partitions(number))

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return the oldest `limit` dead letters: entries that no worker could answer."""
        return self._thread.run(self._client.dead_letters(limit))

    def dead_letter(self, entry_id: str) -> DeadLetter:
        """Return one dead letter. Raises ClientError if none has this id."""
        return self._thread.run(self._client.dead_letter(entry_id))

    def requeue(self, entry_id: str) -> str:
        """Put a dead letter back into its stream, as it was sent. Returns its new entry id there.

        Raises ClientError if there is no such dead letter, if it has no job, or if a job with a record has
        its job id (as a duplicate it would be buried again): submit its contents as a new job instead.
        """
        return self._thread.run(self._client.requeue(entry_id))

    def purge(self, entry_ids: Sequence[str] | None = None) -> int:
        """Delete dead letters for good: all, or those named. Returns how many were deleted."""
        return self._thread.run(self._client.purge(entry_ids))
