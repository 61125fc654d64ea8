"""One partition of a queue as its workers see it: typed calls around `scripts/`, and the reads beside them.

Nothing here retries. Every call may be made again after an error: that is the scripts' design.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgpack
from redis.asyncio import Redis

from ingine.connect.script_pipeline import ScriptPipeline
from ingine.connect.scripts import load_script
from ingine.contract.control import nudge
from ingine.contract.events import UNREADABLE, decode_log, encode_event
from ingine.contract.expiry import expire_due
from ingine.contract.keys import GROUP, RELEASED, SILENT_AFTER_S, Keys, parked
from ingine.errors import ErrorCode, InvalidRequest
from ingine.worker.burial import ending_of
from ingine.worker.entries import Append, Begun, Entry, Finish, Refusal, Verdict, position_or_refusal
from ingine.worker.heartbeat import last_beat_s
from ingine.worker.job_streams import DEFAULT_MAX_COST, JobStreams
from ingine.worker.served_model import ServedModel

LOG_PAGE = 128
"""Events of a log that are read at once: with log probabilities 200 kB, and a log may be a thousand times as
long."""

DEFAULT_LEASE_S = 15.0
"""As in `ingine.worker.settings`."""

MAX_PROMOTED = 100
"""Delayed jobs that one sweep looks at."""

SUSPECT_DEATHS = 2
"""A job that as many workers died under runs alone from then on: it shall not take others down with it."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""The pause after a step that failed. It doubles with each death of the job."""

SCRIPTS = ("promote", "begin", "append", "finish", "release", "delay", "bury", "park")


class Queue(JobStreams):
    """The streams, and what is done with the jobs that came from them."""

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
        """Of tenants, where they are not 1."""
        self._result_ttl_s = result_ttl_s
        self._max_deaths = max_deaths
        self._lease_ms = int(lease_s * 1000)
        self._scripts |= {name: load_script(redis, name) for name in SCRIPTS}
        self._pipeline = ScriptPipeline(redis)
        self._has_parked = False

    async def promote(self) -> bool:
        """Put the delayed jobs whose time has come into their streams. Whether there may be more of them."""
        delayed, prefix = self.keys.delayed, self.keys.job("").encode()
        job_ids = await self._redis.zrange(delayed, 0, MAX_PROMOTED - 1)
        if not job_ids:
            return False
        touched = [delayed, *self.keys.all_jobs, *(prefix + job_id for job_id in job_ids)]
        return await self._scripts["promote"](keys=touched, args=job_ids) == MAX_PROMOTED

    async def expire_due(self) -> bool:
        """End what nobody runs and whose deadline has passed. Whether there may be more of it."""
        return await expire_due(self._redis, self.keys, result_ttl_s=self._result_ttl_s)

    async def begin(
        self, entry: Entry, job_id: str, reply_to: str | None, *, alone: bool = True, model: str | None = None
    ) -> Begun:
        """alone: we have no other job, so may have one that workers died under.

        model: what the job names.
        """
        only_elsewhere = model in self.served_elsewhere and model not in self.model.names
        answer, *fields = await self._pipeline.call(
            self._scripts["begin"],
            keys=[self.keys.jobs(entry.priority), self.keys.job(job_id), self.keys.tokens(job_id)],
            args=[
                GROUP,
                self.worker_id,
                entry.id,
                entry.priority,
                reply_to or "",
                SUSPECT_DEATHS,
                self._max_deaths,
                int(alone),
                self._lease_ms,
                self.model.fingerprint,
                int(entry.abandoned),
                model if only_elsewhere else "",
            ],
        )
        verdict = Verdict(answer.decode())
        match verdict, fields:
            case Verdict.RUN, [attempt, position, deaths, cancel, *times, idempotency_key, model]:
                key = _text(idempotency_key) or None
                return Begun(verdict, attempt, position, deaths, bool(cancel), *times, key, _text(model))
            case Verdict.OTHER_MODEL, [model]:
                return Begun(verdict, fingerprint=_text(model))
        return Begun(verdict)

    async def append(self, appends: Sequence[Append]) -> list[int | Refusal]:
        """Commit a step's tokens in one call. Returns for each the tokens that its log has now, or why it
        has not been written: append.lua."""
        job_key, log_key, channel_name = self.keys.job(""), self.keys.tokens(""), self.keys.channel("")
        keys: list[str] = []
        args: list[str | int | bytes] = [self.worker_id]
        for append in appends:
            job_id = append.job_id
            keys += (job_key + job_id, log_key + job_id)
            channel = channel_name + job_id if append.publish else ""
            args += (append.attempt, append.start, append.position, append.raw, channel)
        answers = await self._pipeline.call_alone(self._scripts["append"], keys=keys, args=args)
        self.contact.made()
        return [position_or_refusal(answer) for answer in answers]

    async def finish(self, finish: Finish) -> int | Refusal:
        """End a job. Returns the tokens that its log has, or Refusal.STALE: finish.lua. Only where these are
        as many as the event says has the job ended."""
        event, keys = finish.event, self.keys
        stream = keys.jobs(finish.entry.priority)
        touched = [stream, keys.job(event.job_id), keys.tokens(event.job_id), keys.bytes, keys.dead]
        touched += [
            keys.deadlines,
            keys.replies(finish.reply_to or ""),
            keys.idem(finish.idempotency_key or ""),
        ]
        error = (event.error or {}) if finish.bury else {}
        answer = await self._pipeline.call(
            self._scripts["finish"],
            keys=touched,
            args=[
                GROUP,
                finish.entry.id,
                finish.attempt,
                event.position,
                event.status,
                encode_event(event),
                keys.channel(event.job_id),
                int(self._result_ttl_s * 1000),
                int(finish.reply_to is not None),
                self.worker_id,
                error.get("code", ""),
                error.get("message", ""),
                event.job_id,
                int(finish.idempotency_key is not None),
            ],
        )
        return position_or_refusal(answer)

    async def release(self, entry: Entry, job_id: str, attempt: int) -> bool:
        """Hand a job over. With attempt 0: an entry that was delivered to us and does not run here."""
        return bool(
            await self._pipeline.call(
                self._scripts["release"],
                keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
                args=[GROUP, self.worker_id, entry.id, attempt, RELEASED],
            )
        )

    async def park(self, entry: Entry, job_id: str, model: str) -> bool:
        """Leave an entry to the workers of `model`, a name or a fingerprint. `tell_parked` tells them."""
        done = await self._pipeline.call(
            self._scripts["park"],
            keys=[self.keys.jobs(entry.priority), self.keys.job(job_id)],
            args=[GROUP, self.worker_id, entry.id, parked(model)],
        )
        self._has_parked = self._has_parked or bool(done)
        return bool(done)

    async def tell_parked(self) -> None:
        """Spare workers of other models waiting for their next sweep."""
        if self._has_parked:
            self._has_parked = False
            await self.tell_released()

    async def delay(self, entry: Entry, job_id: str, attempt: int, pause_s: float | None = None) -> bool:
        """Put a begun job off by `pause_s`. None: after a failure, for a pause that grows with each death."""
        died = pause_s is None
        first_s = FIRST_PAUSE_S if died else pause_s
        pauses_ms = [math.ceil(first_s * 1000), int(died), int(LONGEST_PAUSE_S * 1000)]
        return bool(
            await self._pipeline.call(
                self._scripts["delay"],
                keys=[self.keys.jobs(entry.priority), self.keys.job(job_id), self.keys.delayed],
                args=[GROUP, self.worker_id, entry.id, attempt, job_id, *pauses_ms, RELEASED],
            )
        )

    async def tell_released(self) -> None:
        """Spare the peers waiting for their next sweep."""
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
        """Of an entry that has no job, the dead letter has a msgpack map of its first fields.

        job_id: the job whose record ends too, if it is this entry's, and whose reply is sent, which has
        `metadata`.
        """
        raw = msgpack.packb(dict(entry.foreign)) if entry.foreign else entry.raw
        keys, event, channel, reply_to, key = self.keys, b"", "", None, None
        if job_id is not None:
            error = {"code": code, "message": reason}
            ending = await ending_of(self._redis, keys, entry, job_id, error, metadata)
            event, channel = encode_event(ending.event), keys.channel(job_id)
            reply_to, key = ending.reply_to, ending.idempotency_key
        job = job_id or ""
        touched = [keys.jobs(entry.priority), keys.dead, keys.job(job), keys.tokens(job), keys.deadlines]
        touched += [keys.bytes, keys.replies(reply_to or ""), keys.idem(key or "")]
        args = [GROUP, self.worker_id, entry.id, raw, code, reason, job, int(self._result_ttl_s * 1000)]
        args += [event, channel, int(reply_to is not None), int(key is not None)]
        return bool(await self._scripts["bury"](keys=touched, args=args))

    # ------------------------------------------------------------------------------------- reads

    async def has_peers(self) -> bool:
        """Whether another worker of the queue lives."""
        now_s, _ = await self._redis.time()
        workers = await self._redis.hgetall(self.keys.workers)
        workers.pop(self.worker_id.encode(), None)
        return any(last_beat_s(raw) > now_s - SILENT_AFTER_S for raw in workers.values())

    async def committed(self, job_id: str) -> list[int]:
        """The output token ids in a job's log. Read after `begin`: from then on no other worker can write.

        Raises InvalidRequest for a log that is none: whoever goes on behind it would say something else.
        """
        token_ids: list[int] = []
        start = "-"
        while page := await self._redis.xrange(self.keys.tokens(job_id), min=start, count=LOG_PAGE):
            try:
                for event in decode_log(job_id, len(token_ids), page):
                    token_ids += event.token_ids
            except UNREADABLE as error:
                raise InvalidRequest(ErrorCode.BAD_RECORD, f"its token log is none: {error!r}") from None
            start = f"({page[-1][0].decode()}"
        return token_ids

    async def cancelled_among(self, job_ids: Iterable[str]) -> list[str]:
        """Those of `job_ids` whose records say that they are to end."""
        asked = list(job_ids)
        pipe = self._redis.pipeline(transaction=False)
        for job_id in asked:
            pipe.hget(self.keys.job(job_id), "cancel")
        answers = await pipe.execute(raise_on_error=False)
        return [job_id for job_id, answer in zip(asked, answers, strict=True) if answer == b"1"]


def _text(raw: bytes) -> str:
    """From a record, into which anybody may have written anything."""
    return raw.decode(errors="replace")
