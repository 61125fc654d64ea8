"""Measures how long a consumer's stream pauses when a worker or the server dies: `python
benchmarks/recovery.py`.

    [--trials 50] [--workers 4] [--lease-s 2] [--only kill|terminate|server] [--json PATH]

A job streams from one of several real worker processes (a tiny random model, so that computing costs
nothing), and in the middle of it, in each trial,

    kill       its worker gets `kill -9`: until the next token out of a peer
    terminate  its worker gets SIGTERM: likewise
    server     the server gets `kill -9` and is started again at once, on its own files: until the next token

Seconds as the consumer sees them, from just before the signal. Killed workers are replaced between
trials, not during them. Ends with status 1 if a goal is missed: at p95, lease + 2 s after `kill -9`, 1
s after SIGTERM.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from machine import machine

from ingine.bench.percentile import percentile
from ingine.contract.record import JobStatus
from ingine.errors import ClientError, IngineError
from ingine.producer import AsyncClient, AsyncJobHandle
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.local import LocalWorkers

sys.path.append(str(Path(__file__).parents[1]))  # the tests' tiny models are in no package
from tests.tiny_models import make_tiny_model

NUM_TOKENS = 30_000
"""Maximum of each job. It is never reached, since a trial ends by cancelling the job."""
BEFORE = 20
"""Tokens that the consumer receives before the signal."""
PATIENCE_S = 60.0


class Consumer:
    """Follows one job, and records the arrival of each event: (time.time(), position)."""

    def __init__(self, handle: AsyncJobHandle):
        self.handle = handle
        self.seen: list[tuple[float, int]] = []
        self._arrival = asyncio.Event()
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for chunk in self.handle.stream():
            self.seen.append((time.time(), chunk.position))
            self._arrival.set()

    async def until(self, found: Callable[[], bool]) -> None:
        """Wait for an event that makes `found()` true. Raises TimeoutError, or the stream's error."""
        async with asyncio.timeout(PATIENCE_S):
            while not found():
                if self._following.done():
                    self._following.result()
                    raise IngineError("the job ended within the trial")
                self._arrival.clear()
                await self._arrival.wait()

    async def close(self) -> None:
        """Cancel the job and wait until it has ended, so that the next trial is not disturbed."""
        await self.handle.cancel()
        with suppress(ClientError):
            await self._following
        while not (await self.handle.status()).status.terminal:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


class Pool:
    """Worker processes that can be killed individually, each with its own name."""

    def __init__(self, stack: ExitStack, size: int, **options):
        self._stack, self._size, self._options = stack, size, options
        self._names = (f"worker-{number}" for number in count(1))
        self._running: dict[str, LocalWorkers] = {}

    async def refill(self) -> None:
        """Start the missing workers together, once only one is left."""
        if len(self._running) < 2:
            names = [next(self._names) for _ in range(self._size - len(self._running))]
            started = await asyncio.gather(*(asyncio.to_thread(self._start, name) for name in names))
            self._running |= zip(names, started, strict=True)

    def _start(self, name: str) -> LocalWorkers:
        return self._stack.enter_context(LocalWorkers([name], **self._options))

    def signal(self, name: str, signum: int) -> None:
        os.kill(self._running[name].pid(name), signum)

    async def reap(self, name: str) -> None:
        await asyncio.to_thread(self._running.pop(name).terminate, name)


async def lose_worker(client: AsyncClient, pool: Pool, signum: int) -> dict[str, float]:
    await pool.refill()
    consumer = await streaming(client)
    victim = (await consumer.handle.status()).worker
    signalled = time.time()
    pool.signal(victim, signum)
    while (info := await consumer.handle.status()).worker in (victim, None):
        if time.time() - signalled > PATIENCE_S or info.status is JobStatus.FINISHED:
            raise IngineError(f"no peer took the job of {victim}: {info}")
        await asyncio.sleep(0.005)
    # The peer's begin fences the victim, whose later tokens are discarded. The server uses our clock.
    taken = info.began_at_ms / 1000
    await consumer.until(lambda: consumer.seen[-1][0] > taken)
    next_token = next(at for at, _ in consumer.seen if at > taken)
    await consumer.close()
    await pool.reap(victim)
    return {"next_token_s": next_token - signalled, "taken_s": taken - signalled}


async def lose_server(client: AsyncClient, pool: Pool, server: EmbeddedServer) -> dict[str, float]:
    await pool.refill()
    consumer = await streaming(client)
    signalled = time.time()
    os.kill(server.pid, signal.SIGKILL)
    await asyncio.to_thread(server.start)
    answers = time.time()
    # Events in flight when the server died may still arrive; count only a token from after its restart.
    await consumer.until(lambda: consumer.seen[-1][0] > answers)
    next_token = next(at for at, _ in consumer.seen if at > answers)
    await consumer.close()
    return {"next_token_s": next_token - signalled, "server_away_s": answers - signalled}


async def streaming(client: AsyncClient) -> Consumer:
    """A consumer of a job that is running."""
    handle = await client.submit([1, 2, 3], temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    consumer = Consumer(handle)
    await consumer.until(lambda: len(consumer.seen) >= BEFORE)
    return consumer


async def repeat(
    num_trials: int, name: str, trial: Callable[[], Awaitable[dict[str, float]]]
) -> dict[str, dict[str, float]]:
    measured = []
    for number in range(1, num_trials + 1):
        measured.append(await trial())
        print(f"\r{name} {number}/{num_trials}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    columns = {key: [each[key] for each in measured] for key in measured[0]}
    return {
        key: {f"p{p}": round(percentile(values, p), 4) for p in (50, 95, 100)}
        | {"each": [round(value, 4) for value in values]}
        for key, values in columns.items()
    }


async def measure(server: EmbeddedServer, pool: Pool, num_trials: int, modes: list[str]) -> dict:
    trials = {
        "kill": lambda client: lose_worker(client, pool, signal.SIGKILL),
        "terminate": lambda client: lose_worker(client, pool, signal.SIGTERM),
        "server": lambda client: lose_server(client, pool, server),
    }
    async with AsyncClient(server.url) as client:
        return {mode: await repeat(num_trials, mode, lambda m=mode: trials[m](client)) for mode in modes}


def main(
    trials: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 50,
    workers: Annotated[int, typer.Option(min=2, help="Worker processes.")] = 4,
    lease_s: Annotated[float, typer.Option(min=0.5)] = 2.0,
    only: Annotated[str | None, typer.Option(help="One of kill, terminate, server.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    modes = [only] if only else ["kill", "terminate", "server"]
    with (
        TemporaryDirectory(prefix="ingine-recovery-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        ExitStack() as stack,
    ):
        model = make_tiny_model(Path(folder, "model"), max_position_embeddings=2 * NUM_TOKENS)
        pool = Pool(
            stack,
            workers,
            redis_url=server.url,
            folder=Path(folder),
            num_threads=1,
            model=model,
            kv_cache_bytes=64 << 20,
            lease_s=lease_s,
        )
        figures = asyncio.run(measure(server, pool, trials, modes))
    goals = {"kill": lease_s + 2, "terminate": 1.0}
    report = {"machine": machine(), "lease_s": lease_s, "num_trials": trials, "goals_p95_s": goals} | figures
    missed = print_report(report, figures, goals)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(missed))


def print_report(report: dict, figures: dict, goals: dict[str, float]) -> list[str]:
    """Print the report. Returns the modes whose goal was missed."""
    print(json.dumps(report["machine"]))
    print(f"{'seconds to the next token':28} {'p50':>7} {'p95':>7} {'max':>7}   goal for p95")
    missed = []
    for mode, columns in figures.items():
        for key, values in columns.items():
            goal = goals.get(mode) if key == "next_token_s" else None
            print(
                f"{mode + ' ' + key:28} {values['p50']:7.3f} {values['p95']:7.3f} {values['p100']:7.3f}"
                f"   {goal if goal else ''}"
            )
            if goal and values["p95"] > goal:
                missed.append(mode)
    if "kill" in figures:
        beyond = {p: figures["kill"]["next_token_s"][p] - report["lease_s"] for p in ("p50", "p95", "p100")}
        print(f"{'kill, beyond the lease':28} " + " ".join(f"{value:7.3f}" for value in beyond.values()))
    print("missed: " + ", ".join(missed) if missed else "all goals met")
    return missed


if __name__ == "__main__":
    typer.run(main)
