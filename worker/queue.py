"""One partition of a queue as its workers see it: what they do with its jobs, and what they read.

No method retries. Each may be called again after an error, as all scripts are written for that.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
from redis.asyncio import Redis

from ingine.connect.script_pipeline import ScriptPipeline
from ingine.contract.calls import begin, delivery, hand_back, running
from ingine.contract.calls.begin import Begun
from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.choices import ChoicePositions
from ingine.contract.control import nudge
from ingine.contract.entries import Entry
from ingine.contract.events import UNREADABLE, decode_log, encode_event
from ingine.contract.expiry import expire_due
from ingine.contract.keys import SILENT_AFTER_S, Keys
from ingine.errors import ErrorCode, InvalidRequest
from ingine.worker.burial import ending_of
from ingine.worker.choices import CommittedChoice
from ingine.worker.grammar_version import LLGUIDANCE_VERSION
from ingine.worker.heartbeat import last_beat_s
from ingine.worker.job_streams import DEFAULT_MAX_COST, JobStreams
from ingine.worker.served_model import ServedModel

LOG_PAGE = 128
"""Log events that one call reads: 200 kB with log probabilities. A log may be a thousand times as long."""

DEFAULT_LEASE_S = 15.0
"""The default of `ingine.worker.settings`."""

MAX_PROMOTED = 100
"""Delayed jobs that one sweep looks at."""

SUSPECT_DEATHS = 2
"""A job under which this many workers died runs alone from then on, so that it takes no other job down."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause after a step that failed. It doubles with each death of the job."""


class Queue(JobStreams):
    """The jobs streams of a partition, and the jobs that a worker takes from them."""

    def __init__(
        self,
        keys: Keys,
        worker_id: str,
        redis: Redis,
        model: ServedModel,
        *,
        result_ttl_s: float,
        max_deaths: int,
        model_wait_s: float,
        lease_s: float = DEFAULT_LEASE_S,
        max_cost: int = DEFAULT_MAX_COST,
    ):
        super().__init__(keys, worker_id, redis, model, model_wait_s=model_wait_s, max_cost=max_cost)
        self.weights: dict[str, float] = {}
        """Weights of tenants in fair shares, where they are not 1."""
        self._result_ttl_s = result_ttl_s
        self._max_deaths = max_deaths
        self._lease_ms = int(lease_s * 1000)
        self._pipeline = ScriptPipeline(redis)
        self._has_parked = False

    async def promote(self) -> bool:
        """Move the delayed jobs that are due to their jobs streams. Returns True if there may be more."""
        job_ids = await self._redis.zrange(self.keys.delayed, 0, MAX_PROMOTED - 1)
        if not job_ids:
            return False
        return await self._run(delivery.promote(self.keys, job_ids)) == MAX_PROMOTED

    async def expire_due(self) -> bool:
        """End jobs whose deadline has passed and that no worker runs. Returns True if there may be more."""
        return await expire_due(self._redis, self.keys, result_ttl_s=self._result_ttl_s)

    async def begin(
        self, entry: Entry, job_id: str, reply_to: str | None, *, alone: bool = True, model: str | None = None
    ) -> Begun:
        """Begin the job of an entry under a new attempt.

        alone: this worker has no other job, so it may run one under which workers have died. model: the model
        that the job names.
        """
        only_elsewhere = model in self.served_elsewhere and model not in self.model.names
        return await self._pipeline.call(
            begin.begin(
                self.keys,
                entry,
                worker_id=self.worker_id,
                job_id=job_id,
                reply_to=reply_to,
                suspect_deaths=SUSPECT_DEATHS,
                max_deaths=self._max_deaths,
                alone=alone,
                lease_ms=self._lease_ms,
                fingerprint=self.model.fingerprint,
                model_elsewhere=model if only_elsewhere else None,
                llguidance=LLGUIDANCE_VERSION,
            )
        )

    async def append(self, appends: Sequence[Append]) -> list[int | Refusal]:
        """Commit one step's tokens in one call. Returns for each the number of tokens in its log, or why it
        was not written."""
        call = running.append(self.keys, appends, worker_id=self.worker_id)
        answers = await self._pipeline.call_alone(call)
        self.contact.made()
        return answers

    async def finish(self, finish: Finish) -> int | Refusal:
        """End a job. Returns the number of tokens in its log, or Refusal.STALE.

        The job has ended only if that number is the event's position.
        """
        ttl_ms = int(self._result_ttl_s * 1000)
        return await self._pipeline.call(
            running.finish(self.keys, finish, worker_id=self.worker_id, result_ttl_ms=ttl_ms)
        )

    async def release(self, entry: Entry, job_id: str, attempt: int) -> bool:
        """Hand over a job that runs under `attempt`, for any worker to continue.

        Returns False if it is not ours.
        """
        return await self._pipeline.call(
            hand_back.release(self.keys, entry, worker_id=self.worker_id, job_id=job_id, attempt=attempt)
        )

    async def release_unbegun(self, entry: Entry, job_id: str | None) -> bool:
        """Hand over an entry that was delivered to us and does not run here. Returns False if it is not ours.

        job_id: None if it cannot be read.
        """
        return await self._pipeline.call(
            hand_back.release_unbegun(self.keys, entry, worker_id=self.worker_id, job_id=job_id)
        )

    async def park(self, entry: Entry, job_id: str, model: str) -> bool:
        """Leave an entry to the workers of `model`, a name or a fingerprint. `tell_parked` notifies them.

        Returns False if the entry is not ours.
        """
        was_ours = await self._pipeline.call(
            hand_back.park(self.keys, entry, worker_id=self.worker_id, job_id=job_id, model=model)
        )
        self._has_parked = self._has_parked or was_ours
        return was_ours

    async def tell_parked(self) -> None:
        """Notify the workers of other models, which would see parked entries only at their next sweep."""
        if self._has_parked:
            self._has_parked = False
            await self.tell_released()

    async def delay(self, entry: Entry, job_id: str, attempt: int, pause_s: float | None = None) -> bool:
        """Delay a job that we run by `pause_s`. Returns False if it is not ours.

        None: a step has failed. That counts as a death of the job, and the pause doubles with each one.
        """
        died = pause_s is None
        first_s = FIRST_PAUSE_S if died else pause_s
        return await self._pipeline.call(
            hand_back.delay(
                self.keys,
                entry,
                worker_id=self.worker_id,
                job_id=job_id,
                attempt=attempt,
                pause_ms=math.ceil(first_s * 1000),
                died=died,
                longest_pause_ms=int(LONGEST_PAUSE_S * 1000),
            )
        )

    async def tell_released(self) -> None:
        """Notify the other workers, which would see released entries only at their next sweep."""
        await self._redis.spublish(self.keys.control, nudge("released"))

    async def bury(
        self,
        entry: Entry,
        code: str,
        reason: str,
        *,
        job_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> bool:
        """Move an entry to the dead letters. Returns False if it is not ours.

        The dead letter of an entry without a job has a msgpack map of the entry's first fields. job_id: the
        job that ends too, if its record is of this entry; its reply is sent, and has `metadata`.
        """
        event, reply_to, idempotency_key = b"", None, None
        if job_id is not None:
            error = {"code": code, "message": reason}
            ending = await ending_of(self._redis, self.keys, entry, job_id, error, metadata)
            event = encode_event(ending.event)
            reply_to, idempotency_key = ending.reply_to, ending.idempotency_key
        return await self._run(
            hand_back.bury(
                self.keys,
                entry,
                worker_id=self.worker_id,
                raw=msgpack.packb(dict(entry.foreign)) if entry.foreign else entry.raw,
                code=code,
                reason=reason,
                job_id=job_id,
                event=event,
                reply_to=reply_to,
                idempotency_key=idempotency_key,
                result_ttl_ms=int(self._result_ttl_s * 1000),
            )
        )

    # ------------------------------------------------------------------------------------- reads

    async def has_peers(self) -> bool:
        """Return True if another worker of the queue is alive."""
        now_s, _ = await self._redis.time()
        workers = await self._redis.hgetall(self.keys.workers)
        workers.pop(self.worker_id.encode(), None)
        return any(last_beat_s(raw) > now_s - SILENT_AFTER_S for raw in workers.values())

    async def committed(self, job_id: str) -> list[int]:
        """Read the output token ids in a job's log. Call it after `begin`: then no other worker can write.

        Raises InvalidRequest if the log is damaged: a worker that continued it would generate another text.
        """
        [choice] = await self.committed_choices(job_id, 1)
        return choice.token_ids

    async def committed_choices(self, job_id: str, num_choices: int) -> list[CommittedChoice]:
        """Read what a job's log has of each choice. Like `committed` otherwise."""
        choices = [CommittedChoice() for _ in range(num_choices)]
        position, positions, start = 0, ChoicePositions(from_start=True), "-"
        while page := await self._redis.xrange(self.keys.tokens(job_id), min=start, count=LOG_PAGE):
            try:
                for event in decode_log(job_id, position, page, choices=positions):
                    if (event.choice_position is None) != (num_choices == 1) or event.index >= num_choices:
                        raise ValueError(f"an event of another number of choices than {num_choices}")
                    choice, position = choices[event.index], event.position
                    choice.token_ids += event.token_ids
                    choice.finish_reason, choice.stop_reason = event.finish_reason, event.stop_reason
            except UNREADABLE as error:
                raise InvalidRequest(ErrorCode.BAD_RECORD, f"its token log is damaged: {error!r}") from None
            start = f"({page[-1][0].decode()}"
        return choices

    async def cancelled_among(self, job_ids: Iterable[str]) -> list[str]:
        """Return those of `job_ids` whose records say that a client has requested to cancel them."""
        asked = list(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in asked:
            pipe.hget(self.keys.job(job_id), "cancel")
        answers = await pipe.execute(raise_on_error=False)
        return [job_id for job_id, answer in zip(asked, answers, strict=True) if answer == b"1"]
