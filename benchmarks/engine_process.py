"""Compares the engine's rate alone, in a thread of the worker, and in a process beside it.

    python benchmarks/engine_process.py [--sizes 32:2,128:4,256:6] [--rounds 3] [--json PATH]

Each size is sequences:milliseconds that the device takes for a step of them. The device is a wait without the
interpreter lock, as for a GPU that replays a graph; everything else is real: scheduler, blocks, sampling,
text, queue, publisher, server. `alone` is a loop over `Engine.step`, `process, no Redis` an engine's process
whose tokens nobody commits: what the messages cost. Two ways to use a device:

- in turn: it waits while the CPU prepares a step and reads its tokens;
- ahead: the CPU prepares a step while the device computes the one before.

The machine has to have a core each for engine, event loop and server, or the figures are of that lack:
processor time a step is printed beside the rates. Linux only: it is read from /proc.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from machine import machine
from redis import Redis
from redis_load import cpu_seconds, median, seconds_of
from stand_in import StandInWorker
from step_overhead import StandInDecoder

from ingine.contract.keys import Keys
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.models.config import ModelConfig
from ingine.engine.request import EngineRequest
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.tokenizer import Tokenizer
from ingine.producer import Client
from ingine.sampling_params import SamplingParams
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.hosting.engine_child import serve_engine
from ingine.worker.hosting.engine_link import StepMessage
from ingine.worker.hosting.engine_process import EngineProcess

NUM_PROMPT_TOKENS = 41
MAX_TOKENS = 8000
PARAMS = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
WARM_UP_S = 1.0
HOMES = ("alone", "process, no Redis", "thread", "process")


@dataclass(frozen=True)
class Load:
    num_seqs: int
    device_ms: float
    ahead: bool

    @property
    def name(self) -> str:
        return f"{self.num_seqs} x {self.device_ms:g} ms, {'ahead' if self.ahead else 'in turn'}"


class TimedDecoder(StandInDecoder):
    """A model whose step takes `device_ms`, during which it does not hold the interpreter lock."""

    def __init__(self, config: ModelConfig, load: Load):
        super().__init__(config)
        self._step_s, self._ahead = load.device_ms / 1000, load.ahead
        self._idle_since = 0.0

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        began = time.monotonic()
        if self._ahead:  # the device got this step while it was computing the one before
            began = max(self._idle_since, began - self._step_s)
        time.sleep(max(0.0, began + self._step_s - time.monotonic()))
        self._idle_since = time.monotonic()
        return super().compute_logits(hidden)


def make_engine(load: Load) -> Engine:
    path = resolve_model(DEFAULT_MODEL)
    blocks_of_a_seq = -(-(NUM_PROMPT_TOKENS + MAX_TOKENS) // 16)
    config = EngineConfig(
        DEFAULT_MODEL,
        device="cpu",
        max_num_seqs=load.num_seqs,
        max_num_batched_tokens=load.num_seqs * NUM_PROMPT_TOKENS,
        kv_cache_bytes=load.num_seqs * blocks_of_a_seq,  # a block is a byte here
    )
    model = TimedDecoder(ModelConfig.from_folder(path), load)
    return Engine(config, model=model, tokenizer=Tokenizer.from_folder(path))


def prompt(number: int) -> list[int]:
    return list(range(1000 + number, 1000 + number + NUM_PROMPT_TOKENS))


# ----------------------------------------------------------------------------------- homes of an engine


def alone(load: Load, seconds: float) -> dict:
    engine = make_engine(load)
    for number in range(load.num_seqs):
        engine.add(EngineRequest(str(number), prompt(number), PARAMS))
    engine.step()
    began, cpu_began, num_steps = time.perf_counter(), time.thread_time(), 0
    while (took_s := time.perf_counter() - began) < seconds:
        engine.step()
        num_steps += 1
    cpu_s = time.thread_time() - cpu_began
    return {"tokens_per_s": num_steps * load.num_seqs / took_s, "cpu_ms": {"engine": 1e3 * cpu_s / num_steps}}


def to_nobody(load: Load, seconds: float) -> dict:
    """The rate of an engine's process whose outputs are read and discarded."""
    host = start_engine_process(load)
    num_tokens = 0

    def deliver(message: StepMessage) -> None:
        nonlocal num_tokens
        num_tokens += len(message)
        host.credit()

    async def run() -> dict:
        await host.start(deliver)
        for number in range(load.num_seqs):
            host.add(EngineRequest(str(number), prompt(number), PARAMS, arrival_time=0.0))
        await asyncio.sleep(WARM_UP_S)
        engine = Path(f"/proc/{host.pid}/stat")
        began, num_before, cpu_before = time.perf_counter(), num_tokens, seconds_of(engine)
        await asyncio.sleep(seconds)
        took_s, made = time.perf_counter() - began, num_tokens - num_before
        cpu_s = seconds_of(engine) - cpu_before
        await host.stop()
        return {"tokens_per_s": made / took_s, "cpu_ms": {"engine": 1e3 * cpu_s * load.num_seqs / made}}

    try:
        return asyncio.run(run())
    finally:
        host.close()


def start_engine_process(load: Load) -> EngineProcess:
    command = [sys.executable, __file__, "engine", json.dumps(asdict(load))]
    return EngineProcess(command, lambda: Tokenizer.from_folder(resolve_model(DEFAULT_MODEL)))


def in_worker(load: Load, seconds: float, home: str) -> dict:
    """The rate at which tokens are committed and published."""
    with (
        TemporaryDirectory(prefix="ingine-engine-") as folder,
        EmbeddedServer(Path(folder, "valkey")) as server,
        Client(server.url) as client,
        Redis.from_url(server.url) as redis,
    ):
        jobs = [{"prompt": prompt(number), "sampling": PARAMS} for number in range(load.num_seqs)]
        job_ids = [handle.job_id for handle in client.submit_many(jobs)]
        script = [__file__, "worker", home, json.dumps(asdict(load))]
        with StandInWorker(server.url, Path(folder), script=script, max_num_seqs=load.num_seqs) as worker:
            while committed(redis, job_ids) < 8 * load.num_seqs:
                time.sleep(0.05)
            num_before, cpu_before = committed(redis, job_ids), cpu_of(server, worker)
            began = time.perf_counter()
            time.sleep(seconds)
            num_tokens, took_s = committed(redis, job_ids) - num_before, time.perf_counter() - began
            cpu = {name: spent - cpu_before[name] for name, spent in cpu_of(server, worker).items()}
    num_steps = num_tokens / load.num_seqs
    return {
        "tokens_per_s": num_tokens / took_s,
        "cpu_ms": {name: 1e3 * spent / num_steps for name, spent in cpu.items()},
    }


def committed(redis: Redis, job_ids: list[str]) -> int:
    """Committed tokens of all jobs together."""
    with redis.pipeline(transaction=False) as pipe:
        for job_id in job_ids:
            pipe.hget(Keys().job(job_id), "position")
        return sum(int(position or 0) for position in pipe.execute())


def cpu_of(server: EmbeddedServer, worker: StandInWorker) -> dict[str, float]:
    """Processor seconds so far: of the thread or process with the engine, the event loop, and the server."""
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    cpu = cpu_seconds(server.pid, worker.pid)
    engine = cpu["worker_other_threads"] + sum(seconds_of(Path(f"/proc/{pid}/stat")) for pid in children)
    return {"engine": engine, "event loop": cpu["worker_loop"], "server": cpu["server"]}


def run_worker(home: str, load: Load) -> None:
    """Run `ingine worker` with this engine, as the child process."""
    import ingine.cli.worker
    from ingine.worker.hosting.engine_thread import EngineThread
    from ingine.worker.served_model import ServedModel
    from ingine.worker.settings import load_settings

    def build_engine(settings):
        in_thread = home == "thread"
        engine = EngineThread(lambda: make_engine(load)) if in_thread else start_engine_process(load)
        return engine, ServedModel(frozenset({"stand-in"}), "stand-in", engine.numerics)

    ingine.cli.worker.build_engine = build_engine
    ingine.cli.worker.run_worker(load_settings())


# ------------------------------------------------------------------------------------------------ report


def measure(load: Load, home: str, seconds: float) -> dict:
    match home:
        case "alone":
            return alone(load, seconds)
        case "process, no Redis":
            return to_nobody(load, seconds)
        case _:
            return in_worker(load, seconds, home)


def main(
    sizes: Annotated[str, typer.Option(help="sequences:ms of the device for a step.")] = "32:2,128:4,256:6",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each; the medians are reported.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each is watched.")] = 4.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    loads = [
        Load(int(num_seqs), float(ms), ahead)
        for num_seqs, ms in (size.split(":") for size in sizes.split(","))
        for ahead in (False, True)
    ]
    measured: dict[str, dict[str, list[dict]]] = {load.name: {home: [] for home in HOMES} for load in loads}
    for _ in range(rounds):
        for load in loads:
            for home in HOMES:
                measured[load.name][home].append(figures := measure(load, home, seconds))
                print(f"{load.name}, {home}: {figures['tokens_per_s']:,.0f} tokens/s", file=sys.stderr)
    medians = {
        load: {home: median(figures) for home, figures in homes.items()} for load, homes in measured.items()
    }
    print_table(medians)
    if json_path:
        report = {"machine": machine(), "rounds": rounds, "medians": medians, "each": measured}
        json_path.write_text(json.dumps(report, indent=2) + "\n")


def print_table(medians: dict[str, dict[str, dict]]) -> None:
    print(json.dumps(machine()))
    print("| sequences x device | engine | tokens/s | of alone | processor ms a step: engine, loop, server |")
    print("| --- | --- | --- | --- | --- |")
    for load, homes in medians.items():
        for home, figures in homes.items():
            rate = figures["tokens_per_s"]
            cpu = ", ".join(f"{ms:.2f}" for ms in figures["cpu_ms"].values())
            share = rate / homes["alone"]["tokens_per_s"]
            print(f"| {load} | {home} | {rate:,.0f} | {share:.2f} | {cpu} |")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["worker", home, load]:
            run_worker(home, Load(**json.loads(load)))
        case ["engine", load]:
            serve_engine(lambda: make_engine(Load(**json.loads(load))))
        case _:
            typer.run(main)
