"""Measures what one worker and one server can carry, without a model: `python benchmarks/redis_load.py`.

    [--seqs 32,64,256,512] [--rounds 3] [--jobs 0] [--profile] [--json PATH]

Each round has a server and a worker of its own (benchmarks/stand_in.py), whose engine costs nothing:
the figures are the cost of queue, scripts, publisher and server. All jobs are submitted first, then run;
each has 32 to 96 tokens, and no consumer listens. The engine is always ahead, so an event has the tokens of
all steps that wait for the server; their number is reported. Sizes take turns, so that noise on the machine
affects all alike. Linux only: processor times are read from /proc.
"""

import asyncio
import json
import os
import pstats
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from machine import machine
from redis import Redis
from stand_in import StandInWorker

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient
from ingine.worker.embedded import EmbeddedServer

PROMPT = list(range(100, 132))
SUBMITTED_ONE_BY_ONE = 2000
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def main(
    seqs: Annotated[str, typer.Option(help="Values of max_num_seqs, separated by commas.")] = "32,64,256,512",
    tokens: Annotated[
        str, typer.Option(help="Mean tokens a job, separated by commas; half more or less.")
    ] = "64,256",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each; the medians are reported.")] = 3,
    jobs: Annotated[
        int, typer.Option(min=0, help="Jobs a round. 0: 256,000 tokens, 8 for each sequence.")
    ] = 0,
    profile: Annotated[bool, typer.Option(help="One round of the first size under cProfile.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    sizes = [(int(size), int(mean)) for mean in tokens.split(",") for size in seqs.split(",")]
    if profile:
        with TemporaryDirectory(prefix="ingine-load-") as folder:
            path = Path(folder, "profile")
            print_figures(run_round(*sizes[0], jobs, profile=path))
            pstats.Stats(str(path)).sort_stats("tottime").print_stats(40)
        return
    measured: dict[str, list[dict]] = {f"{size} x {mean}": [] for size, mean in sizes}
    for _ in range(rounds):
        for size, mean in sizes:
            measured[name := f"{size} x {mean}"].append(run_round(size, mean, jobs))
            print(f"{name}: {measured[name][-1]['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    medians = {size: median(figures) for size, figures in measured.items()}
    report = {"machine": machine(), "rounds": rounds, "medians": medians, "each": measured}
    print_table(medians)
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def run_round(max_num_seqs: int, mean_tokens: int, jobs: int, *, profile: Path | None = None) -> dict:
    num_jobs = jobs or 256_000 // mean_tokens + 8 * max_num_seqs
    with (
        TemporaryDirectory(prefix="ingine-load-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        Redis.from_url(server.url, protocol=2) as redis,
    ):
        memory_before = redis.info("memory")["used_memory"]
        figures = asyncio.run(submit_all(server.url, num_jobs, mean_tokens))
        asyncio.run(pause(server.url, True))
        figures["bytes_per_queued_job"] = (redis.info("memory")["used_memory"] - memory_before) / num_jobs
        with StandInWorker(server.url, Path(folder), profile=profile, max_num_seqs=max_num_seqs) as worker:
            figures |= run_jobs(redis, server, worker.pid, num_jobs)
        figures["server_used_memory_mib"] = redis.info("memory")["used_memory"] / 2**20
        return figures


async def submit_all(url: str, num_jobs: int, mean_tokens: int) -> dict:
    """Submit most jobs in one `submit_many`, the others one by one. Returns the jobs per second of both."""
    lengths = random.Random(0)
    low, high = mean_tokens // 2, mean_tokens * 3 // 2
    jobs = [
        {"prompt": PROMPT, "max_tokens": lengths.randint(low, high), "temperature": 0}
        for _ in range(num_jobs)
    ]
    num_single = min(SUBMITTED_ONE_BY_ONE, num_jobs // 2)
    async with AsyncClient(url) as client:
        await client.queue_info()
        started = time.perf_counter()
        for job in jobs[:num_single]:
            await client.submit(**job)
        single_s = time.perf_counter() - started
        await client.submit_many(jobs[num_single:])
        many_s = time.perf_counter() - started - single_s
    return {
        "num_jobs": num_jobs,
        "submit_jobs_per_s": num_single / single_s,
        "submit_many_jobs_per_s": (num_jobs - num_single) / many_s,
    }


async def pause(url: str, paused: bool) -> None:
    async with AsyncClient(url) as client:
        await (client.pause() if paused else client.resume())


def run_jobs(redis: Redis, server: EmbeddedServer, worker_pid: int, num_jobs: int) -> dict:
    """Run the jobs. Times are from the first begin to the last end, by the server's clock in the records."""
    redis.config_resetstat()
    cpu_before = cpu_seconds(server.pid, worker_pid)
    asyncio.run(pause(server.url, False))
    while any(redis.xlen(stream) for stream in Keys().all_jobs):
        time.sleep(0.2)
    cpu = {name: spent - cpu_before[name] for name, spent in cpu_seconds(server.pid, worker_pid).items()}
    commands = redis.info("commandstats")
    records = list(read_records(redis))
    if len(records) != num_jobs or {status for status, *_ in records} != {b"finished"}:
        raise RuntimeError(f"{len(records)} of {num_jobs} jobs, not all of them finished")
    wall_s = (max(int(r[3]) for r in records) - min(int(r[2]) for r in records)) / 1000
    num_tokens = sum(int(position) for _, position, *_ in records)
    return {
        "num_tokens": num_tokens,
        "wall_s": wall_s,
        "tokens_per_s": num_tokens / wall_s,
        "jobs_per_s": num_jobs / wall_s,
        "tokens_per_event": num_tokens / (commands["cmdstat_xadd"]["calls"] - num_jobs),  # minus its end
        "cpu_us_per_token": {name: spent / num_tokens * 1e6 for name, spent in cpu.items()},
        "commands": {
            name.removeprefix("cmdstat_"): {"calls": stat["calls"], "usec_per_call": stat["usec_per_call"]}
            for name, stat in sorted(commands.items(), key=lambda item: -item[1]["usec"])[:10]
        },
        "server_us_per_token_in_scripts": commands["cmdstat_evalsha"]["usec"] / num_tokens,
    }


def read_records(redis: Redis):
    """Read status, position, began_at and finished_at of every job."""
    keys = list(redis.scan_iter(match=Keys().job("*"), count=1000))
    for start in range(0, len(keys), 1000):
        with redis.pipeline(transaction=False) as pipe:
            for key in keys[start : start + 1000]:
                pipe.hmget(key, "status", "position", "began_at", "finished_at")
            yield from pipe.execute()


def cpu_seconds(server_pid: int, worker_pid: int) -> dict[str, float]:
    """Processor time so far: of the server, of the worker's event loop, and of its other threads."""
    worker = seconds_of(Path(f"/proc/{worker_pid}/stat"))
    loop = seconds_of(Path(f"/proc/{worker_pid}/task/{worker_pid}/stat"))
    server = seconds_of(Path(f"/proc/{server_pid}/stat"))
    return {"server": server, "worker_loop": loop, "worker_other_threads": worker - loop}


def seconds_of(path: Path) -> float:
    """Processor time so far, by the `stat` file of a process or of a thread."""
    user, system = path.read_text().rpartition(") ")[2].split()[11:13]
    return (int(user) + int(system)) / TICKS_PER_S


def median(figures: list[dict]) -> dict:
    """The median of each figure, nested ones included."""
    first = figures[0]
    return {
        name: median([each[name] for each in figures if name in each])
        if isinstance(value, dict)
        else statistics.median(each[name] for each in figures)
        for name, value in first.items()
        if name != "commands"
    }


def print_table(medians: dict[str, dict]) -> None:
    print(json.dumps(machine()))
    columns = (
        "tokens/s",
        "tokens/event",
        "jobs/s",
        "submit/s",
        "submit_many/s",
        "server us",
        "loop us",
        "threads us",
        "MiB",
    )
    print(f"{'sequences':>9} " + " ".join(f"{column:>13}" for column in columns))
    for size, figures in medians.items():
        cpu = figures["cpu_us_per_token"]
        row = [
            f"{figures['tokens_per_s']:,.0f}",
            f"{figures['tokens_per_event']:.2f}",
            f"{figures['jobs_per_s']:,.0f}",
            f"{figures['submit_jobs_per_s']:,.0f}",
            f"{figures['submit_many_jobs_per_s']:,.0f}",
            *(f"{cpu[name]:.1f}" for name in ("server", "worker_loop", "worker_other_threads")),
            f"{figures['server_used_memory_mib']:.0f}",
        ]
        print(f"{size:>9} " + " ".join(f"{cell:>13}" for cell in row))
    print("us: processor time a token, of the server, the worker's event loop and its other threads")


def print_figures(figures: dict) -> None:
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    typer.run(main)
