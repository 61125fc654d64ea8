"""One run of chaos: start everything, apply the scheduled faults, wait for all work to end, and audit the
result."""

import asyncio
import random
import signal
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from ingine.contract.keys import Keys, all_partitions
from tests.chaos import forgers, jobs
from tests.chaos.audit import audit
from tests.chaos.journal import read
from tests.chaos.messages import PARSERS
from tests.chaos.outputs import read_answers
from tests.chaos.proxy import FAULTS as WIRE_FAULTS
from tests.chaos.proxy import ProxyProcess
from tests.chaos.schedule import Fault, fate, kinds, schedule
from tests.chaos.seen import Seen
from tests.chaos.servers import Cluster, Pair
from tests.chaos.snapshot import Snapshot, take
from tests.chaos.table import Report
from tests.chaos.zygote import Zygote

QUEUE = "chaos"
MAX_JOBS = 64
"""The queue's limit, which bursts exceed."""
MAX_DEATHS = 8
"""More than the default: jobs are often in a worker that another job or fault kills."""
NUM_WORKERS, NUM_PRODUCERS, NUM_CONSUMERS = 3, 3, 3
WORKER = {
    "queue": QUEUE,
    "dtype": "float32",
    "device": "cpu",
    "max_num_seqs": 8,
    "kv_cache_bytes": 512 << 10,  # too little for eight long sequences: some are preempted
    "http_port": -1,
    "lease_s": 2.0,
    "max_deaths": MAX_DEATHS,
    "drain_timeout_s": 5.0,
    "step_timeout_s": 6.0,  # longer than a worker is frozen
} | PARSERS
CALM_TIMEOUT_S = 600.0
SEEN_AS = {
    "kill_worker": "worker killed: kill -9",
    "stop_worker": "worker stopped",
    "freeze_worker": "worker frozen",
}
"""The name under which a fault is counted, if it is neither of a connection nor of a server."""
MAY_MISS = ("kill_producer", "kill_consumer", "freeze_consumer")
"""Faults whose target may have finished its work already."""


class Run:
    def __init__(
        self, seed: int, folder: Path, *, duration_s: float, num_jobs: int, poison_every: int, cluster: bool
    ):
        self._seed, self._folder, self._duration_s = seed, folder, duration_s
        self._num_jobs, self._poison_every, self._cluster = num_jobs, poison_every, cluster
        self._random = random.Random(f"{seed}:run")
        self._report = Report(seed, folder, "three-node cluster" if cluster else "primary and replica")
        self._lives: Counter = Counter()
        self._killed: set[str] = set()
        self._told_to_stop: set[str] = set()
        self._calm = self._leaving = False
        self._done: set[str] = set()
        self._restarts: set[asyncio.Task] = set()
        self._one_server_fault = asyncio.Lock()

    async def run(self) -> Report:
        (self._folder / "logs").mkdir(parents=True)
        async with AsyncExitStack() as stack:
            proxy = await ProxyProcess().start()
            stack.push_async_callback(proxy.stop)
            self._proxy = proxy
            self._servers = (Cluster if self._cluster else Pair)(self._folder, proxy, self._seed)
            stack.push_async_callback(self._servers.stop)
            await self._servers.start()
            self._zygote = Zygote(self._folder / "logs", self._ended)
            stack.push_async_callback(self._zygote.stop)
            await self._zygote.start()
            await self._zygote.spawn(
                "reference",
                "reference",
                model=str(self._folder / "model"),
                answers=str(self._folder / "answers"),
            )
            await self._until(lambda: "reference" in self._done, "the uninterrupted run")
            if not (self._folder / "answers").exists():
                raise RuntimeError(f"no uninterrupted run: {self._zygote.log('reference').read_text()}")
            await self._set_limits()
            started = time.monotonic()
            await self._start_all()
            await self._break_things(started)
            await self._calm_down()
            self._report.duration_s = time.monotonic() - started
            await self._audit()
        return self._report

    # ------------------------------------------------------------------------------------- processes

    async def _start_all(self) -> None:
        for kind, number in (
            ("worker", NUM_WORKERS),
            ("producer", NUM_PRODUCERS),
            ("consumer", NUM_CONSUMERS),
            ("forger", 1),
        ):
            for index in range(number):
                await self._start(kind, index)

    async def _start(self, kind: str, index: int) -> None:
        """Start or restart this worker, producer or consumer."""
        life = self._lives[kind]
        self._lives[kind] += 1
        name = f"{kind}-{index}-{life}"
        await self._zygote.spawn(name, kind, **getattr(self, f"_{kind}")(index, life, name))

    def _worker(self, index: int, life: int, name: str) -> dict[str, Any]:
        settings = WORKER | {
            "redis_url": self._servers.url, "worker_id": name, "model": str(self._folder / "model")
        }  # fmt: skip
        return {"settings": settings, "fate": {} if self._calm else fate(self._seed, life)}

    def _producer(self, index: int, life: int, name: str) -> dict[str, Any]:
        die_after = None if self._calm or life % 2 else self._random.randint(1, 60)
        return {
            "url": self._servers.url, "queue": QUEUE, "journal": self._journal("producer", index),
            "seed": self._seed, "first": index, "step": NUM_PRODUCERS, "end": self._num_jobs,
            "interval_s": 0.8 * self._duration_s * NUM_PRODUCERS / self._num_jobs,
            "poison_every": self._poison_every, "die_after": die_after,
        }  # fmt: skip

    def _consumer(self, index: int, life: int, name: str) -> dict[str, Any]:
        return {
            "url": self._servers.url, "queue": QUEUE, "journal": self._journal("consumer", index),
            "sources": [self._journal("producer", number) for number in range(NUM_PRODUCERS)],
            "remainder": index, "modulus": NUM_CONSUMERS, "end": self._num_jobs,
        }  # fmt: skip

    def _forger(self, index: int, life: int, name: str) -> dict[str, Any]:
        return {
            "url": self._servers.url, "queue": QUEUE, "num_partitions": self._servers.num_partitions,
            "journal": self._journal("forger", index), "seed": self._seed, "duration_s": self._duration_s,
            "sources": [self._journal("producer", number) for number in range(NUM_PRODUCERS)],
        }  # fmt: skip

    def _journal(self, kind: str, index: int) -> str:
        return str(self._folder / f"{kind}-{index}.journal")

    def _ended(self, name: str, status: int) -> None:
        """Called for each process that ends. Restarts it unless it has finished its work."""
        kind, _, rest = name.partition("-")
        self._done.add(name)
        if kind == "worker":
            self._count_worker(name, status)
        elif kind == "reference":
            return
        elif status == -signal.SIGKILL:
            self._report.counts[f"{kind} killed"] += 1
        elif status:
            self._report.failures.append(f"{name} ended with {status}, see its log")
        if self._leaving or (kind != "worker" and status == 0):
            return
        again = asyncio.create_task(self._start(kind, int(rest[0])))
        self._restarts.add(again)
        again.add_done_callback(self._restarts.discard)

    def _count_worker(self, name: str, status: int) -> None:
        log = self._zygote.log(name).read_text(errors="replace")
        whys = [line.removeprefix("chaos: ") for line in log.splitlines() if line.startswith("chaos: ")]
        if status == 0 or (status == -signal.SIGTERM and "worker ready" not in log):
            self._report.counts["worker stopped"] += 1
        elif status == -signal.SIGKILL:
            own = [why.split()[0] for why in whys if why.startswith(("crash", "poison"))]
            kind = own[0] if own and name not in self._killed else "kill -9"
            self._report.counts[f"worker killed: {kind}"] += 1
        elif "step hangs" in whys:
            self._report.counts["worker killed: watchdog"] += 1
        else:
            self._report.failures.append(f"{name} ended with {status}, see its log")
        for event in ("step raises", "reply lost"):
            self._report.counts[event] += whys.count(event)

    # ------------------------------------------------------------------------------------- faults

    @property
    def _max_jobs(self) -> int:
        """The limit is each partition's."""
        return MAX_JOBS // self._servers.num_partitions

    async def _set_limits(self) -> None:
        number = self._servers.num_partitions
        settings = {"max_jobs": self._max_jobs, "partitions": number}
        for keys in {Keys(QUEUE), *all_partitions(QUEUE, number)}:
            await self._servers.owner(keys.settings).hset(keys.settings, mapping=settings)

    async def _break_things(self, started: float) -> None:
        async with asyncio.TaskGroup() as group:
            over = asyncio.Event()
            group.create_task(self._watch_the_limit(over))
            for fault in schedule(self._seed, self._duration_s, replica=not self._cluster):
                await asyncio.sleep(started + fault.at_s - time.monotonic())
                group.create_task(self._commit(fault))
            await asyncio.sleep(started + self._duration_s - time.monotonic())
            over.set()  # a call that times out at the same moment might swallow a cancellation

    async def _commit(self, fault: Fault) -> None:
        if fault.kind in WIRE_FAULTS:
            node = self._servers.target(fault.draw)
            if await self._proxy.ask(fault=fault.kind, front=node.front, **fault.options):
                self._report.counts[f"wire: {fault.kind}"] += 1
        elif hasattr(self._servers, fault.kind):
            async with self._one_server_fault:
                node = self._servers.target(fault.draw)
                arguments = [] if fault.kind == "failover" else [node]
                await getattr(self._servers, fault.kind)(*arguments, **fault.options)
                self._report.counts[f"server: {fault.kind}"] += 1
        else:
            action, _, kind = fault.kind.partition("_")
            await self._signal(action, kind, fault)

    async def _signal(self, action: str, kind: str, fault: Fault) -> None:
        victim = self._victim(kind, fault)
        if victim is None:
            return
        if action == "freeze":
            await self._freeze(victim, kind, fault)
        elif action == "kill":
            self._killed.add(victim)
            self._zygote.signal(victim, signal.SIGKILL)
        else:
            self._told_to_stop.add(victim)
            self._zygote.signal(victim, signal.SIGTERM)

    def _victim(self, kind: str, fault: Fault) -> str | None:
        living = sorted(name for name in self._zygote.pids if name.startswith(kind))
        return living[int(fault.draw * len(living))] if living else None

    async def _freeze(self, victim: str | None, kind: str, fault: Fault) -> None:
        """Freeze a process and wake it. If another fault kills it meanwhile, freeze another one."""
        for _ in range(3):
            if victim is None or not self._zygote.signal(victim, signal.SIGSTOP):
                return
            if kind == "consumer":
                await self._servers.flood()
            await asyncio.sleep(fault.options["for_s"])
            if self._zygote.signal(victim, signal.SIGCONT):
                self._report.counts[f"{kind} frozen"] += 1
                return
            victim = self._victim(kind, fault)

    async def _watch_the_limit(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await asyncio.sleep(1.0)
            for keys in all_partitions(QUEUE, self._servers.num_partitions):
                try:
                    moment = self._servers.owner(keys.settings).pipeline(transaction=True)
                    for stream in keys.all_jobs:
                        moment.xlen(stream)
                    length = sum(await moment.zcard(keys.delayed).execute())
                except (RedisError, OSError):
                    continue
                if length > self._max_jobs:
                    self._report.failures.append(f"{length} jobs in a queue for {self._max_jobs}")

    # -------------------------------------------------------------------------------------- the end

    async def _calm_down(self) -> None:
        """Wait without further faults until all jobs and processes have ended."""
        self._calm = True
        await self._until(lambda: not self._living("forger"), "the forger's end")
        await self._until(lambda: not self._living("producer"), "every job's submission")
        await self._until(lambda: not self._living("consumer"), "every stream's end")
        await self._until(self._empty, "the end of every job")
        self._leaving = True
        for name in set(self._living("worker")) - self._told_to_stop:  # a second signal would end it at once
            self._zygote.signal(name, signal.SIGTERM)
        await self._until(lambda: not self._living("worker"), "every worker's leave")

    def _living(self, kind: str) -> list[str]:
        return [name for name in self._zygote.pids if name.startswith(kind)]

    async def _empty(self) -> bool:
        for keys in all_partitions(QUEUE, self._servers.num_partitions):
            owner = self._servers.owner(keys.settings)
            if any([await owner.xlen(stream) for stream in keys.all_jobs]) or await owner.exists(
                keys.delayed
            ):
                return False
        return True

    async def _until(self, condition, what: str) -> None:
        deadline = time.monotonic() + CALM_TIMEOUT_S
        while True:
            met = condition()
            if await met if asyncio.iscoroutine(met) else met and not self._restarts:
                return
            if time.monotonic() > deadline:
                self._report.failures.append(f"{what} did not come within {CALM_TIMEOUT_S:.0f} s")
                return
            await asyncio.sleep(0.1)

    async def _audit(self) -> None:
        report, snapshot = self._report, Snapshot()
        report.counts["slow consumer cut off"] = self._servers.num_cut_off
        for keys in all_partitions(QUEUE, self._servers.num_partitions):
            await take(self._servers.owner(keys.settings), keys, snapshot)
        accepted, cancelled = [], set()
        for index in range(NUM_PRODUCERS):
            for record in read(Path(self._journal("producer", index))):
                if "job_id" in record:
                    accepted.append((record["number"], record["job_id"]))
                if record.get("cancel") == "cancelled":
                    cancelled.add(record["number"])
                report.counts["submission refused: queue full"] += record.get("refused") == "full"
        seen: dict[str, Seen] = {}
        for index in range(NUM_CONSUMERS):
            for record in read(Path(self._journal("consumer", index))):
                seen.setdefault(record["job_id"], Seen()).take(record)
        for record in read(Path(self._journal("forger", 0))):
            for kind in forgers.KINDS:
                report.counts[f"forged: {kind}"] += record["forged"].get(kind, 0)
        report.num_accepted = len(set(accepted))
        if report.num_accepted != self._num_jobs:
            report.failures.append(f"{report.num_accepted} of {self._num_jobs} jobs were accepted")
        for kind in kinds(replica=not self._cluster):
            if kind not in MAY_MISS and not report.counts[SEEN_AS.get(kind) or _seen_as(kind)]:
                report.failures.append(f"{kind} was to happen, and never did")
        for kind in forgers.KINDS:
            if not report.counts[f"forged: {kind}"]:
                report.failures.append(f"nobody has heard a forged message of the kind {kind}")
        report.findings = audit(
            accepted,
            lambda number: jobs.spec(self._seed, number, poison_every=self._poison_every),
            snapshot,
            seen,
            read_answers(self._folder / "answers"),
            cancelled=cancelled,
        )


def _seen_as(kind: str) -> str:
    return f"wire: {kind}" if kind in WIRE_FAULTS else f"server: {kind}"
