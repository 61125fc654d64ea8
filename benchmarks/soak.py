"""Checks for leaks with 200,000 short jobs through one worker and one server: `python benchmarks/soak.py`.

    [--jobs 200000] [--json PATH]

The engine costs nothing (benchmarks/stand_in.py); jobs have 8 tokens, and their results are kept for 5
s. In the end nothing may be left of any job: only the keys that belong to the queue itself, and memory
as it was before: the server's `used_memory` within 2 MiB of what it was when the worker was ready,
before the first job, and the worker's resident memory within 10 % of what it was after the first tenth
of the jobs. Ends with status 1 otherwise. Linux only: the worker's memory is read from /proc.
"""

import asyncio
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from machine import machine
from redis.asyncio import Redis
from stand_in import StandInWorker

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient
from ingine.worker.embedded import EmbeddedServer

NUM_TOKENS, RESULT_TTL_S, MAX_NUM_SEQS = 8, 5, 256
BATCH, MOST_WAITING = 1000, 4000
SERVER_TOLERANCE_MIB, WORKER_TOLERANCE = 2.0, 0.10
MIB = 1 << 20
LASTING_KEYS = {*Keys().all_jobs, Keys().settings, Keys().workers}
"""The keys that a queue has while a worker serves it, even without jobs."""


def main(
    jobs: Annotated[int, typer.Option(min=20_000)] = 200_000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    with (
        TemporaryDirectory(prefix="ingine-soak-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        StandInWorker(
            server.url,
            Path(folder),
            max_num_seqs=MAX_NUM_SEQS,
            result_ttl_s=RESULT_TTL_S,
            log_level="warning",
        ) as worker,
    ):
        rows, left = asyncio.run(soak(server.url, worker.pid, jobs))
    faults = judge(rows, left)
    print("\n".join(faults) or "nothing grew, and nothing is left")
    report = {
        "machine": machine(),
        "num_jobs": jobs,
        "keys_left": sorted(left),
        "faults": faults,
        "rows": rows,
    }
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(bool(faults))


async def soak(url: str, worker_pid: int, num_jobs: int) -> tuple[list[dict], set[str]]:
    """Run the jobs.

    Returns a row of figures for each tenth, and before and after all; and the keys that are left.
    """
    async with AsyncClient(url) as client, Redis.from_url(url, protocol=2) as redis:
        started, rows = time.monotonic(), []

        async def read(num_submitted: int) -> None:
            memory, stats = await redis.info("memory"), await redis.info("persistence")
            rows.append(
                {
                    "num_submitted": num_submitted,
                    "seconds": round(time.monotonic() - started, 1),
                    "server_used_mib": round(memory["used_memory"] / MIB, 2),
                    "server_rss_mib": round(memory["used_memory_rss"] / MIB, 1),
                    "aof_mib": round(stats["aof_current_size"] / MIB, 1),
                    "worker_rss_mib": round(resident_bytes(worker_pid) / MIB, 1),
                    "num_keys": await redis.dbsize(),
                }
            )
            print("  ".join(f"{name} {value:>9}" for name, value in rows[-1].items()), flush=True)

        await read(0)
        for submitted in range(0, num_jobs, BATCH):
            await few_wait(redis, MOST_WAITING)
            await client.submit_many(
                {"prompt": [1, 2, 3, 4], "max_tokens": NUM_TOKENS, "temperature": 0}
                for _ in range(min(BATCH, num_jobs - submitted))
            )
            if (submitted + BATCH) % (num_jobs // 10) < BATCH:
                await read(submitted + BATCH)
        await few_wait(redis, 0)
        await asyncio.sleep(RESULT_TTL_S)
        left = await keys_left(redis)
        await read(num_jobs)
        return rows, left


async def few_wait(redis: Redis, limit: int) -> None:
    """Wait until at most `limit` jobs wait or run."""
    while sum([await redis.xlen(stream) for stream in Keys().all_jobs]) > limit:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def keys_left(redis: Redis) -> set[str]:
    """The keys other than the lasting ones. Waits up to a minute for the server to delete expired keys."""
    for _ in range(60):
        left = {key.decode() async for key in redis.scan_iter(count=1000)} - LASTING_KEYS
        if not left:
            break
        await asyncio.sleep(1)
    return left


def judge(rows: list[dict], left: set[str]) -> list[str]:
    """The failed checks, as sentences."""
    before, first_tenth, end = rows[0], rows[1], rows[-1]
    faults = [f"{len(left)} keys are left: {sorted(left)[:5]}"] if left else []
    server_mib = end["server_used_mib"] - before["server_used_mib"]
    if server_mib > SERVER_TOLERANCE_MIB:
        faults.append(f"the server has {server_mib:.1f} MiB more than before the first job")
    growth = end["worker_rss_mib"] / first_tenth["worker_rss_mib"] - 1
    if growth > WORKER_TOLERANCE:
        faults.append(f"the worker has grown by {growth:.0%} since the first tenth of the jobs")
    return faults


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
