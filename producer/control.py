"""Looking at a queue, steering it, and its dead letters: the operator's half of the client."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.errors import ClientError, InvalidJob
from ingine.wire import (
    DEFAULT_MAX_JOB_BYTES,
    DEFAULT_MAX_QUEUED_JOBS,
    GROUP,
    JOB_FIELD,
    Keys,
    Priority,
    decode_job,
)
from producer.connection import Server
from producer.results import DeadLetter, QueueInfo

RELEASED = b"released"
"""The consumer that holds the entries which a stopping worker has handed over: they wait."""


def load_script(redis: Redis, name: str):
    """A Lua script of this package; sent once, then known to the server by its hash."""
    return redis.register_script((files("producer") / "scripts" / f"{name}.lua").read_text())


class QueueControl:
    """Base of `AsyncClient`: what concerns the queue as a whole instead of one job."""

    def __init__(self, server: Server, keys: Keys):
        self._server, self._keys = server, keys
        self._requeue_script = load_script(server.redis, "requeue")

    async def queue_info(self) -> QueueInfo:
        """Depth by priority, limits, switches, workers and the number of dead letters, as of one moment."""
        pipeline = self._server.redis.pipeline(transaction=True)
        for jobs in self._keys.all_jobs:
            pipeline.xlen(jobs)
            pipeline.xpending(jobs, GROUP)
        pipeline.hgetall(self._keys.settings)
        pipeline.hgetall(self._keys.workers)
        pipeline.xlen(self._keys.dead)
        pipeline.time()
        *streams, settings, workers, num_dead, (now_s, _) = await self._server.call(
            lambda: pipeline.execute(raise_on_error=False)
        )
        waiting, running = {}, {}
        for priority, num_entries, pending in zip(Priority, streams[::2], streams[1::2], strict=True):
            running[str(priority)] = _num_running(pending)
            waiting[str(priority)] = num_entries - running[str(priority)]
        switches = {name.decode(): value.decode() for name, value in settings.items()}
        return QueueInfo(
            queue=self._keys.queue,
            waiting=waiting,
            running=running,
            max_jobs=int(switches.get("max_jobs", DEFAULT_MAX_QUEUED_JOBS)),
            max_job_bytes=int(switches.get("max_job_bytes", DEFAULT_MAX_JOB_BYTES)),
            paused=switches.get("paused") == "1",
            draining=sorted(name.removeprefix("drain:") for name in switches if name.startswith("drain:")),
            workers={name.decode(): _heartbeat(raw, now_s) for name, raw in workers.items()},
            num_dead=num_dead,
        )

    async def pause(self) -> None:
        """Workers take no further jobs; what runs goes on, and `submit` still accepts."""
        await self._server.call(lambda: self._server.redis.hset(self._keys.settings, "paused", 1))
        await self._nudge({"command": "pause"})

    async def resume(self) -> None:
        """Undo `pause`."""
        await self._server.call(lambda: self._server.redis.hdel(self._keys.settings, "paused"))
        await self._nudge({"command": "resume"})

    async def drain(self, worker_id: str) -> None:
        """Tell one worker to hand its jobs over and exit. Raises ClientError if no such worker is alive."""
        workers = await self._server.call(lambda: self._server.redis.hkeys(self._keys.workers))
        if worker_id.encode() not in workers:
            alive = ", ".join(sorted(name.decode() for name in workers)) or "none"
            raise ClientError(f"no worker {worker_id!r} in queue {self._keys.queue!r}; there are: {alive}")
        switch = f"drain:{worker_id}"
        await self._server.call(lambda: self._server.redis.hset(self._keys.settings, switch, 1))
        await self._nudge({"command": "drain", "worker": worker_id})

    async def set_limits(self, *, max_jobs: int | None = None, max_job_bytes: int | None = None) -> None:
        """Limits of the whole queue, from now on; None leaves one as it is. Raises ValueError below 1."""
        given = {"max_jobs": max_jobs, "max_job_bytes": max_job_bytes}
        limits = {name: limit for name, limit in given.items() if limit is not None}
        if bad := [name for name, limit in limits.items() if limit < 1]:
            raise ValueError(f"{bad[0]} is at least 1, not {limits[bad[0]]}")
        if limits:
            await self._server.call(lambda: self._server.redis.hset(self._keys.settings, mapping=limits))

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The oldest `limit` entries that no worker could answer."""
        entries = await self._server.call(lambda: self._server.redis.xrange(self._keys.dead, count=limit))
        return [_dead_letter(entry_id, fields) for entry_id, fields in entries]

    async def dead_letter(self, entry_id: str) -> DeadLetter:
        """Raises ClientError if there is none with this id."""
        entries = await self._server.call(
            lambda: self._server.redis.xrange(self._keys.dead, min=entry_id, max=entry_id)
        )
        if not entries:
            raise ClientError(_no_letter(entry_id))
        return _dead_letter(*entries[0])

    async def requeue(self, entry_id: str) -> str:
        """Put a dead letter back into its stream, as it was sent. Returns its new entry id there.

        Raises ClientError if it is not there any more, or if its job id is taken by a job with a record (a
        duplicate, which would be buried again): submit its contents anew instead.
        """
        letter = await self.dead_letter(entry_id)
        if letter.stream not in self._keys.all_jobs:
            raise ClientError(f"dead letter {entry_id} came from {letter.stream!r}, which is no jobs stream")
        touched = [self._keys.dead, letter.stream]
        if letter.job_id is not None:
            touched.append(self._keys.job(letter.job_id))
        answer = await self._server.call(lambda: self._requeue_script(keys=touched, args=[entry_id]))
        verdict, detail = (part.decode() for part in answer)
        if verdict == "known":
            raise ClientError(
                f"job {letter.job_id} of dead letter {entry_id} is known and {detail}: an id cannot run "
                "twice. Submit its contents anew, under another id"
            )
        if verdict == "missing":
            raise ClientError(_no_letter(entry_id))
        return detail

    async def purge(self, entry_ids: Sequence[str] | None = None) -> int:
        """Delete dead letters for good, all of them if none is named. Returns how many there were."""
        dead = self._keys.dead
        if entry_ids is not None:
            named = [*entry_ids]
            return await self._server.call(lambda: self._server.redis.xdel(dead, *named)) if named else 0
        pipeline = self._server.redis.pipeline(transaction=True).xlen(dead).delete(dead)
        num_letters, _ = await self._server.call(pipeline.execute)
        return num_letters

    async def _nudge(self, command: dict[str, str]) -> None:
        """So that workers look at once. It may get lost: they look by themselves now and then."""
        await self._server.call(
            lambda: self._server.redis.spublish(self._keys.control, msgpack.packb(command))
        )


def _num_running(pending: dict | RedisError) -> int:
    if isinstance(pending, RedisError):  # NOGROUP: no worker has ever looked at this stream
        return 0
    return sum(consumer["pending"] for consumer in pending["consumers"] if consumer["name"] != RELEASED)


def _heartbeat(raw: bytes, now_s: int) -> dict[str, Any]:
    fields = msgpack.unpackb(raw)
    return fields | {"silent_s": now_s - fields["at_s"]}


def _dead_letter(entry_id: bytes, fields: dict[bytes, bytes]) -> DeadLetter:
    text = {name.decode(): value.decode(errors="replace") for name, value in fields.items()}
    raw = fields[JOB_FIELD.encode()]
    return DeadLetter(
        entry_id=entry_id.decode(),
        job=raw,
        job_id=_readable_id(raw),
        code=text["code"],
        reason=text["reason"],
        stream=text["stream"],
        entry=text["entry"],
        deliveries=int(text["deliveries"]),
        worker=text["worker"],
    )


def _readable_id(raw: bytes) -> str | None:
    try:
        return decode_job(raw, max_bytes=len(raw)).id
    except InvalidJob as error:
        return error.job_id


def _no_letter(entry_id: str) -> str:
    return f"no dead letter {entry_id!r}: requeued or purged already"
