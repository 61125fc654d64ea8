"""Measure the effect of a flooding tenant on another tenant's jobs: `python benchmarks/flood.py`.

    [--source NAME=FOLDER]... [--rounds 1] [--seconds 120] [--lease-s 15] [--json PATH]

Two real worker processes run on a real server. One tenant keeps the queue full of the worst jobs that its
limits let in (`worst_jobs.py`, every kind in turns), by bare XADDs; another submits a small job a second.
The report has the other tenant's times to first token, the attempts (a lost lease causes another one) and
deaths of its jobs, the ends of the flood's jobs by code, the workers' log lines about leases and fences,
whether the workers live at the end, and the peak memory of each worker with its children.

Sources (folders with the packages ingine and worker) take turns, each time with a server and workers of
their own. The model is that of `admission_cost.py`. It runs on Linux only: memory is read from /proc.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from admission_cost import GROUP, STREAM, make_model
from machine import machine
from redis import Redis
from worst_jobs import DUPLICATE, KINDS, JobMaker

from ingine.bench.percentile import percentile
from ingine.contract.events import decode_event
from ingine.errors import ClientError
from ingine.producer import AsyncClient
from ingine.worker.embedded import EmbeddedServer

NUM_WORKERS = 2
MOST_WAITING = 48
"""Jobs of the flood at once: more than two workers have room for."""
PATIENCE_S = 60.0
SMALL = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "tenant": "innocent"}
LOST = ("job fenced", "leases not renewed", "job resumed", "worker failed", "Traceback")
MIB = 1 << 20


class Workers:
    """Worker processes of one source, each with its log and its peak memory."""

    def __init__(self, stack: ExitStack, source: Path, folder: Path, **settings: object):
        env = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "INGINE_HTTP_PORT": "-1"}
        env |= {f"INGINE_{name.upper()}": str(value) for name, value in settings.items()}
        self._logs = [folder / f"worker-{number}.log" for number in range(NUM_WORKERS)]
        self._popens = []
        for log in self._logs:
            with log.open("wb") as output:
                command = [sys.executable, "-P", "-m", "ingine.cli.main", "worker"]
                popen = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, cwd=folder
                )
            self._popens.append(popen)
        stack.callback(self._stop)
        while not all("worker ready" in log.read_text() for log in self._logs):
            if self.num_alive < NUM_WORKERS:
                raise RuntimeError(f"a worker ended by itself:\n{self._logs[0].read_text()}")
            time.sleep(0.1)
        self.peak_bytes = 0

    @property
    def num_alive(self) -> int:
        return sum(popen.poll() is None for popen in self._popens)

    def look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, *(tree_bytes(popen.pid) for popen in self._popens))

    def lines(self) -> list[str]:
        """The lines of their logs about a lost job or lease."""
        text = "\n".join(log.read_text(errors="replace") for log in self._logs)
        return [line for line in text.splitlines() if any(sign in line for sign in LOST)]

    def _stop(self) -> None:
        for popen in self._popens:
            popen.terminate()
        for popen in self._popens:
            try:
                popen.wait(20)
            except subprocess.TimeoutExpired:
                popen.kill()


class Flood(threading.Thread):
    """Keeps `MOST_WAITING` jobs in the queue, every kind in turns."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self._redis = Redis.from_url(url)
        self._stopped = threading.Event()
        self.num_submitted = 0

    def run(self) -> None:
        maker = JobMaker()
        while not self._stopped.wait(0.05):
            for _ in range(MOST_WAITING - self._redis.xlen(STREAM)):
                kind = KINDS[self.num_submitted % len(KINDS)]
                job_id = "flood-0" if kind == DUPLICATE else f"flood-{self.num_submitted}"
                entry = maker.entry(kind, job_id, tenant="flood", reply_to="flood")
                self._redis.xadd(STREAM, entry | {"tenant": "flood"})
                self.num_submitted += 1

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def ends(self) -> Counter[str]:
        """The number of its jobs by final status or code, or `buried`."""
        ends = Counter({"buried " + fields[b"code"].decode(): 0 for _, fields in self._dead()})
        ends.update("buried " + fields[b"code"].decode() for _, fields in self._dead())
        for _, fields in self._redis.xrange("ingine:{default}:replies:flood"):
            end = decode_event(fields[b"event"])
            ends[(end.error or {}).get("code") or str(end.status)] += 1
        return ends

    def _dead(self) -> list:
        return self._redis.xrange("ingine:{default}:dead")


def main(
    source: Annotated[list[str] | None, typer.Option(help="What to measure, as NAME=FOLDER.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each source is measured.")] = 1,
    seconds: Annotated[float, typer.Option(min=10, help="How long a round's flood lasts.")] = 120.0,
    lease_s: Annotated[float, typer.Option(min=0.5, help="The workers' lease, in seconds.")] = 15.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    sources = dict(each.split("=", 1) for each in source or [f"here={Path(__file__).parents[1]}"])
    measured: dict[str, list[dict]] = {name: [] for name in sources}
    with TemporaryDirectory(prefix="ingine-flood-") as folder:
        model = make_model(Path(folder))
        for number in range(rounds):
            for name, path in list(sources.items())[:: -1 if number % 2 else 1]:
                place = Path(folder, f"{name}-{number}")
                place.mkdir()
                measured[name].append(run_round(Path(path).resolve(), model, place, seconds, lease_s))
                print(f"{name}: {json.dumps(measured[name][-1], indent=2)}", flush=True)
    if json_path:
        report = {"machine": machine(), "seconds": seconds, "lease_s": lease_s, "rounds": measured}
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def run_round(source: Path, model: Path, folder: Path, seconds: float, lease_s: float) -> dict:
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(folder / "server"))
        settings = {"redis_url": server.url, "model": model, "lease_s": lease_s, "kv_cache_bytes": "256MiB"}
        workers = Workers(stack, source, folder, **settings)
        alone = asyncio.run(submit_small_ones(server.url, workers, 10.0))
        bytes_alone = workers.peak_bytes
        flood = Flood(server.url)
        flood.start()
        beside = asyncio.run(submit_small_ones(server.url, workers, seconds))
        flood.stop()
        return {
            "alone": summary(alone),
            "beside the flood": summary(beside),
            "flood": {"submitted": flood.num_submitted, "ends": dict(flood.ends().most_common())},
            "workers alive": workers.num_alive,
            "lines in their logs": workers.lines(),
            "memory of a worker, MiB": {
                "before the flood": round(bytes_alone / MIB),
                "at most": round(workers.peak_bytes / MIB),
            },
            "left in the queue": left(server.url),
        }


async def submit_small_ones(url: str, workers: Workers, seconds: float) -> list[dict]:
    """Submit one job per second, even if earlier ones have not ended."""
    async with AsyncClient(url) as client:
        jobs, until = [], time.monotonic() + seconds
        while time.monotonic() < until:
            jobs.append(asyncio.create_task(follow(client)))
            for _ in range(4):
                await asyncio.sleep(0.25)
                workers.look()
        return list(await asyncio.gather(*jobs))


async def follow(client: AsyncClient) -> dict:
    began = time.monotonic()
    first_s = None
    try:
        async with asyncio.timeout(PATIENCE_S):
            handle = await client.submit(**SMALL)
            async for chunk in handle.stream():
                if first_s is None and chunk.token_ids:
                    first_s = time.monotonic() - began
            info = await handle.status()
    except (ClientError, TimeoutError) as error:
        return {"first_s": first_s, "error": type(error).__name__}
    return {"first_s": first_s, "attempts": info.attempt, "deaths": info.deaths, "status": str(info.status)}


def summary(jobs: list[dict]) -> dict:
    first = [job["first_s"] for job in jobs if job["first_s"] is not None] or [float("nan")]
    return {
        "jobs": len(jobs),
        "first_token_s": {
            "median": round(statistics.median(first), 3),
            "p95": round(percentile(first, 95), 3),
            "most": round(max(first), 3),
        },
        "without a first token": sum(job["first_s"] is None for job in jobs),
        "errors": dict(Counter(job["error"] for job in jobs if "error" in job)),
        "begun again": sum(job.get("attempts", 1) > 1 for job in jobs),
        "deaths": sum(job.get("deaths", 0) for job in jobs),
    }


def left(url: str) -> dict[str, int]:
    with Redis.from_url(url) as redis:
        return {"entries": redis.xlen(STREAM), "pending": redis.xpending(STREAM, GROUP)["pending"]}


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes. Ended processes count 0."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = [
            child
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(tree_bytes(int(child)) for child in children)


if __name__ == "__main__":
    typer.run(main)
