"""Send submissions to the partitions that they belong to."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Sequence

from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.scripts import run_script, run_together
from ingine.contract.calls.producing import SubmitReply, SubmitVerdict
from ingine.contract.calls.script_call import ScriptCall
from ingine.contract.keys import partition_of
from ingine.errors import ClientError, InvalidJob, NoWorker
from ingine.producer.partitions import Partition, Partitions
from ingine.producer.queue_info import num_serving
from ingine.producer.submission import Repartitioned, Submission

SUBMISSIONS_PER_TRIP = 256
MAX_ATTEMPTS = 10
"""Attempts while the number of partitions changes, which takes a moment."""

Refusal = ClientError


class Submitter:
    def __init__(self, partitions: Partitions, *, require_worker: bool = False):
        self._partitions = partitions
        self._require_worker = require_worker

    async def submit(self, submission: Submission) -> str:
        """Submit a job and return its id. Raises the errors of `AsyncClient.submit`."""
        [outcome] = await self._trip([submission])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def submit_many(self, submissions: Sequence[Submission]) -> tuple[list[str], Refusal | None]:
        """Submit jobs. Returns the ids of the accepted ones, in order, and the first refusal.

        No further round trip follows a refusal.
        """
        accepted: list[str] = []
        for start in range(0, len(submissions), SUBMISSIONS_PER_TRIP):
            outcomes = await self._trip(submissions[start : start + SUBMISSIONS_PER_TRIP])
            accepted += [outcome for outcome in outcomes if isinstance(outcome, str)]
            if refusal := next((outcome for outcome in outcomes if isinstance(outcome, Exception)), None):
                return accepted, refusal
        return accepted, None

    async def _trip(self, submissions: Sequence[Submission]) -> list[str | Refusal]:
        """Return the outcome of each. Sends a job again if its partition has changed."""
        outcomes: dict[int, str | Refusal] = {}
        for attempt in range(MAX_ATTEMPTS):
            missing = [n for n in range(len(submissions)) if n not in outcomes]
            if not missing:
                return [outcomes[n] for n in range(len(submissions))]
            try:
                if attempt:
                    await asyncio.sleep(0.1 * attempt * random.uniform(0.5, 1.0))
                ask = self._partitions.latest if attempt else self._partitions.all
                partitions = await ask()
            except ClientError as error:
                return [outcomes.get(n, error) for n in range(len(submissions))]
            groups: dict[Partition, dict[int, Submission]] = defaultdict(dict)
            for n in missing:
                try:
                    placed = submissions[n].placed(len(partitions))
                    groups[partitions[partition_of(placed.job.id, len(partitions))]][n] = placed
                except InvalidJob as error:
                    outcomes[n] = error
            sent = (self._send(partition, group, len(partitions)) for partition, group in groups.items())
            for some in await asyncio.gather(*sent):
                outcomes |= some
        unplaced = self._partitions.unsettled()
        return [outcomes.get(n, unplaced) for n in range(len(submissions))]

    async def _send(
        self, partition: Partition, group: dict[int, Submission], num_partitions: int
    ) -> dict[int, str | Refusal]:
        """Submit jobs to one partition. Returns the outcomes of those that belong to it."""
        submissions = list(group.values())
        try:
            if self._require_worker and not await partition.call(num_serving):
                raise NoWorker(
                    f"no worker serves queue {partition.keys.queue!r}, nothing was accepted: start one with "
                    "`ingine worker`, or submit without require_worker"
                )
            answers = await self._ask(partition, submissions, [None] * len(submissions), num_partitions)
            # Only a second call can check whether the job that an idempotency key names still exists.
            known = {n: reply.detail for n, reply in enumerate(answers) if _is_known(reply)}
            if known:
                again = [submissions[n] for n in known]
                final = await self._ask(partition, again, list(known.values()), num_partitions)
                answers = [dict(zip(known, final, strict=True)).get(n, a) for n, a in enumerate(answers)]
        except ClientError as error:
            return dict.fromkeys(group, error)
        outcomes = {}
        for (n, submission), answer in zip(group.items(), answers, strict=True):
            try:
                if isinstance(answer, exceptions.RedisError):
                    raise partition.server.unavailable(answer)
                outcomes[n] = submission.accepted_id(answer, partition.keys)
            except ClientError as error:
                outcomes[n] = error
            except Repartitioned:
                continue  # `_trip` asks for the new number of partitions, and sends it again
        return outcomes

    async def _ask(
        self,
        partition: Partition,
        submissions: Sequence[Submission],
        same: Sequence[str | None],
        num_partitions: int,
    ) -> list[SubmitReply | exceptions.RedisError]:
        calls = [
            submission.script_call(partition.keys, num_partitions, job_id)
            for submission, job_id in zip(submissions, same, strict=True)
        ]
        return await partition.call(lambda redis, _: _run(redis, calls))


async def _run(
    redis: Redis, calls: list[ScriptCall[SubmitReply]]
) -> list[SubmitReply | exceptions.RedisError]:
    if len(calls) == 1:
        return [await run_script(redis, calls[0])]
    return await run_together(redis, calls)


def _is_known(reply: SubmitReply | exceptions.RedisError) -> bool:
    """A job was submitted before with this idempotency key."""
    return isinstance(reply, SubmitReply) and reply.verdict is SubmitVerdict.SAME
