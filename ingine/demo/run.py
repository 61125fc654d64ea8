"""Runs the demo: submit from several processes, stream, kill a worker, stream on, and count."""

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from redis import Redis
from rich.console import Console

from ingine.connect.url import redact
from ingine.contract.keys import EVENT_FIELD, Keys
from ingine.contract.record import JobStatus
from ingine.demo.audit import Audit, audit
from ingine.demo.plan import Plan, plan_for
from ingine.demo.prompts import QUESTIONS, Question
from ingine.demo.report import Report
from ingine.demo.screen import open_screen
from ingine.demo.streams import Stream
from ingine.errors import ConfigError, IngineError
from ingine.producer import AsyncClient, Client, JobInfo
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.identity import name_of
from ingine.worker.local import LocalWorkers

NUM_PRODUCERS = 4
WORKERS = ("worker-a", "worker-b")
LEASE_S = 3.0
MAX_NUM_SEQS = 24
"""Limit for each worker: more than half of all jobs, so that the surviving worker has room for the other's
jobs once their leases expire; but not all, since the first worker takes as many as it has room for."""
MAX_NUM_BATCHED_TOKENS = 96
"""Larger steps are hardly faster on one thread, and delay the first tokens of all prompts in a step until the
step ends."""
STALL_TIMEOUT_S = 60
FRAMES_PER_S = 6
SCHEMES = ("redis://", "rediss://", "unix://")


def run(console: Console, *, folder: Path, redis_url: str | None) -> bool:
    """Run the demo with the model in `folder`, which is in Hugging Face's format.

    Returns True if every job finished, a killed worker's jobs went on, and no token was lost or repeated.
    """
    plan = plan_for(folder)
    queue = f"demo-{uuid4().hex[:8]}"
    if redis_url is not None:
        _check_server(redis_url, queue)
    with ExitStack() as stack:
        own = Path(stack.enter_context(TemporaryDirectory(prefix="ingine-demo-")))
        if redis_url is None:
            server = stack.enter_context(EmbeddedServer(own / "valkey"))
            redis_url = server.url
            console.print(
                f"Valkey server of the demo's own: {redact(redis_url)}, with the password that is in "
                f"{server.url_path}",
                highlight=False,
                soft_wrap=True,
            )
        workers = LocalWorkers(
            WORKERS,
            redis_url=redis_url,
            queue=queue,
            folder=own,
            num_threads=1,
            model=folder,
            lease_s=LEASE_S,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
            max_model_len=plan.max_model_len,
        )
        console.print(
            f"Starting {len(WORKERS)} workers, one thread each. A dead worker's jobs go on elsewhere "
            f"after its lease: {LEASE_S:g} s here, 15 s by default.",
            highlight=False,
            soft_wrap=True,
        )
        stack.callback(_delete_keys, redis_url, Keys(queue))  # after the workers have gone
        stack.enter_context(workers)
        report = asyncio.run(Demo(console, redis_url, queue, workers, plan).run())
    console.print(report.table())
    console.print(report.verdict, style="bold green" if report.passed else "bold red")
    return report.passed


class Demo:
    """One run of the demo against running workers."""

    def __init__(self, console: Console, redis_url: str, queue: str, workers: LocalWorkers, plan: Plan):
        self._plan = plan
        self._redis_url, self._queue, self._workers = redis_url, queue, workers
        self._keys = Keys(queue)
        self._streams: list[Stream] = []
        self._screen = open_screen(console, self._streams)
        self._alive = set(workers.names)
        self._news = asyncio.Condition()

    async def run(self) -> Report:
        async with AsyncClient(self._redis_url, queue=self._queue) as client:
            with self._screen:
                started = time.monotonic()
                await self._until_all_end(client)
                wall_s = time.monotonic() - started
        with Redis.from_url(self._redis_url) as redis:
            return Report(self._streams, [self._audit(redis, s) for s in self._streams], wall_s)

    async def _until_all_end(self, client: AsyncClient) -> None:
        frames = asyncio.create_task(self._draw())
        try:
            async with asyncio.TaskGroup() as group:
                await self._submit(lambda stream: group.create_task(self._consume(client, stream)))
                group.create_task(self._kill_one(client))
                group.create_task(self._watch_for_stall())
        except* IngineError as errors:
            raise errors.exceptions[0] from None
        finally:
            frames.cancel()
            with suppress(asyncio.CancelledError):
                await frames

    async def _submit(self, follow: Callable[[Stream], object]) -> None:
        """Submit all questions at once from several processes, and follow each job once it has an id."""
        pipe = asyncio.subprocess.PIPE
        env = os.environ | {"INGINE_REDIS_URL": self._redis_url, "INGINE_QUEUE": self._queue}
        producers = [
            await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "ingine.demo.producer", str(index), str(NUM_PRODUCERS)),
                env=env,
                stdin=pipe,
                stdout=pipe,
                start_new_session=True,
            )
            for index in range(NUM_PRODUCERS)
        ]
        for producer in producers:
            await producer.stdout.readline()
        for producer in producers:
            producer.stdin.write(self._plan.as_line())
            producer.stdin.close()
        await asyncio.gather(*(self._follow_jobs_of(producer, follow) for producer in producers))
        if len(self._streams) != len(self._plan.max_tokens):
            raise IngineError(f"{len(self._streams)} of {len(self._plan.max_tokens)} jobs were submitted")
        self._streams.sort(key=lambda stream: stream.number)
        self._screen.say(f"{NUM_PRODUCERS} producers submitted {len(self._streams)} jobs at once")

    async def _follow_jobs_of(
        self, producer: asyncio.subprocess.Process, follow: Callable[[Stream], object]
    ) -> None:
        async for line in producer.stdout:
            fields = json.loads(line)
            stream = Stream(question=self._question(fields["number"]), **fields)
            self._streams.append(stream)
            follow(stream)
        await producer.wait()

    def _question(self, number: int) -> Question:
        return replace(QUESTIONS[number], max_tokens=self._plan.max_tokens[str(number)])

    async def _consume(self, client: AsyncClient, stream: Stream) -> None:
        await stream.follow(client, self._news)
        self._screen.tell(
            f"{stream.number + 1:>3} {stream.question.priority:6} {stream.ending}, {stream.position} tokens: "
            f"{' '.join(stream.text.split())[:60]}"
        )

    async def _kill_one(self, client: AsyncClient) -> None:
        """Kill the busier worker with `kill -9` in mid-generation."""
        enough = self._plan.kill_after_num_tokens
        await self._until(lambda: sum(stream.position for stream in self._streams) >= enough)
        held = Counter(name_of(info.worker) for _, info in await self._running(client))
        if not held:
            return  # all jobs have ended already: the report will say so
        victim, _ = held.most_common(1)[0]
        self._alive.remove(victim)
        self._workers.kill(victim)
        for stream, info in await self._running(client):
            if name_of(info.worker) == victim:
                stream.interrupted_at = info.position
        self._screen.say(
            f"kill -9 {self._workers.pid(victim)}: {victim} is dead, {held[victim]} streams in mid-sentence"
        )
        await self._until(lambda: any(stream.resumed for stream in self._streams))
        self._screen.say(f"{', '.join(self._alive)} goes on with them, each after its last token")

    async def _running(self, client: AsyncClient) -> list[tuple[Stream, JobInfo]]:
        streams = [stream for stream in self._streams if stream.running]
        infos = await asyncio.gather(*(client.status(stream.job_id) for stream in streams))
        return [(s, info) for s, info in zip(streams, infos, strict=True) if info.status is JobStatus.RUNNING]

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is met, or all streams have ended."""
        async with self._news:
            await self._news.wait_for(lambda: condition() or all(s.ending for s in self._streams))

    async def _watch_for_stall(self) -> None:
        """Raise IngineError if a living worker exits, or no token arrives for STALL_TIMEOUT_S."""
        position, since = -1, time.monotonic()
        while not all(stream.ending for stream in self._streams):
            self._workers.require_running(self._alive)
            if (now_at := sum(stream.position for stream in self._streams)) != position:
                position, since = now_at, time.monotonic()
            elif time.monotonic() - since > STALL_TIMEOUT_S:
                raise IngineError(f"no token for {STALL_TIMEOUT_S} s")
            await asyncio.sleep(0.5)

    async def _draw(self) -> None:
        while True:
            self._screen.draw()
            await asyncio.sleep(1 / FRAMES_PER_S)

    def _audit(self, redis: Redis, stream: Stream) -> Audit:
        entries = redis.xrange(self._keys.tokens(stream.job_id))
        log = [(entry_id.decode(), fields[EVENT_FIELD.encode()]) for entry_id, fields in entries]
        return audit(log, stream.seen, stream.text)


def _check_server(redis_url: str, queue: str) -> None:
    """Raise ConfigError for a server that the demo cannot use, and ServerUnavailable for one that is away.

    Workers would wait for the latter.
    """
    if not redis_url.startswith(SCHEMES):
        raise ConfigError(f"--redis-url: the demo uses one server, by a URL with {', '.join(SCHEMES)}")
    with Client(redis_url, queue=queue) as client:
        client.queue_info()


def _delete_keys(redis_url: str, keys: Keys) -> None:
    """Delete all keys of the demo: the server may be the user's own."""
    with Redis.from_url(redis_url) as redis:
        if names := list(redis.scan_iter(f"{keys.prefix}:*", count=1000)):
            redis.unlink(*names)
