"""Measure the cost of following jobs token by token: `python benchmarks/follow.py`.

    [--streams 64,256] [--tokens 200] [--step-ms 20] [--rounds 3] [--json PATH]

It runs a server, a worker whose engine only waits (benchmarks/stand_in.py), and all consumers in itself.
Each token's text is the time at which the engine made it, so a consumer knows the token's age. It runs on
Linux only: processor times are read from /proc.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import stand_in
import typer
from machine import machine
from redis import Redis
from redis_load import median, seconds_of

from ingine.bench.percentile import percentile
from ingine.producer import AsyncClient, AsyncJobHandle
from ingine.worker.embedded import EmbeddedServer

STEP_VARIABLE = "FOLLOW_STEP_S"


class StampingEngine(stand_in.StandInEngine):
    def __init__(self, max_num_seqs: int):
        super().__init__(max_num_seqs, float(os.environ[STEP_VARIABLE]))

    def step(self, *, alone: str | None = None):
        outputs = super().step(alone=alone)
        stamp = f"{time.monotonic_ns()} "
        for output in outputs:
            output.text = stamp if output.token_ids else ""
        return outputs


def main(
    streams: Annotated[str, typer.Option(help="Numbers of streams, separated by commas.")] = "64,256",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each job, one an event.")] = 200,
    step_ms: Annotated[float, typer.Option(help="How long a step of the engine takes.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each; the medians are reported.")] = 3,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    os.environ[STEP_VARIABLE] = str(step_ms / 1000)
    measured: dict[str, list[dict]] = {size: [] for size in streams.split(",")}
    for _ in range(rounds):
        for size in measured:
            measured[size].append(run_round(int(size), tokens))
            print(size, measured[size][-1], file=sys.stderr)
    report = {
        "machine": machine(),
        "step_ms": step_ms,
        "medians": {size: median(figures) for size, figures in measured.items()},
        "each": measured,
    }
    print(json.dumps(report["medians"], indent=2))
    if json_path:
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def run_round(num_streams: int, num_tokens: int) -> dict:
    with (
        TemporaryDirectory(prefix="ingine-follow-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        Redis.from_url(server.url, protocol=2) as redis,
        stand_in.StandInWorker(
            server.url, Path(folder), script=(__file__, "worker"), max_num_seqs=num_streams
        ) as worker,
    ):
        pids = {"server": server.pid, "worker": worker.pid, "client": os.getpid()}
        before = {name: seconds_of(Path(f"/proc/{pid}/stat")) for name, pid in pids.items()}
        redis.config_resetstat()
        ages = asyncio.run(follow_all(server.url, num_streams, num_tokens))
        spent = {name: seconds_of(Path(f"/proc/{pid}/stat")) - before[name] for name, pid in pids.items()}
        commands = redis.info("commandstats")
    total = num_streams * num_tokens
    reads = sum(commands.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("xrange", "xread"))
    return {
        "cpu_us_per_token": {name: round(seconds / total * 1e6, 1) for name, seconds in spent.items()},
        "age_ms": {f"p{share}": round(percentile(ages, share), 2) for share in (50, 95, 99)},
        "age_ms_mean": round(statistics.fmean(ages), 2),
        "reads_per_token": round(reads / total, 3),
    }


async def follow_all(url: str, num_streams: int, num_tokens: int) -> list[float]:
    """The age of each token when its consumer received it, in ms.

    The first tenth of each stream is left out, since it has the start of the streams.
    """
    async with AsyncClient(url) as client:
        sampling = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True}
        handles = await client.submit_many(
            {"prompt": [1, 2, 3], "sampling": sampling} for _ in range(num_streams)
        )
        ages = await asyncio.gather(*(follow(handle, num_tokens) for handle in handles))
    return [age for of_one in ages for age in of_one]


async def follow(handle: AsyncJobHandle, num_tokens: int) -> list[float]:
    ages = []
    async for chunk in handle.stream():
        now = time.monotonic_ns()
        if chunk.position > num_tokens / 10:
            ages += [(now - int(stamp)) / 1e6 for stamp in chunk.text.split()]
    return ages


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        stand_in.StandInEngine = StampingEngine
        stand_in.main()
    else:
        typer.run(main)
