"""A worker of two ranks, started by torchrun as in production, but on CPUs: it serves, hands over, and loses
nothing when a rank dies.
"""

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis.asyncio

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys
from ingine.sampling_params import SamplingParams
from ingine.worker.child import Child
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.conftest import Harness
from tests.worker.test_worker import GREEDY, alone

SHORT = (
    Job(id="greedy", prompt="Hello, ", sampling=GREEDY),
    Job(id="dice", prompt="Once", sampling=SamplingParams(seed=7, max_tokens=24, ignore_eos=True)),
)
LONG = Job(
    id="long",
    prompt="A long story: ",
    sampling=SamplingParams(temperature=0, max_tokens=450, ignore_eos=True),
)
START_TIMEOUT_S = HANGS_S
pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds ranks in /proc")


class Torchrun:
    """`torchrun ... ingine worker` with two ranks."""

    def __init__(self, log: Path, settings: dict[str, object]):
        self._log = log
        env = {name: value for name, value in os.environ.items() if not name.startswith("INGINE_")}
        env |= {f"INGINE_{name.upper()}": str(value) for name, value in settings.items()}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        worker = ["-m", "ingine.cli.main", "worker", "--tensor-parallel-size", "2"]
        with log.open("wb") as output:
            self._child = Child([sys.executable, *launcher, *worker], output=output, env=env)

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def running(self) -> bool:
        return self._child.running

    def pid(self, rank: int) -> int:
        children = Path(f"/proc/{self._child.pid}/task/{self._child.pid}/children").read_text().split()
        (pid,) = (pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
        return int(pid)

    def terminate(self) -> None:
        os.kill(self._child.pid, signal.SIGTERM)

    def stop(self) -> None:
        self._child.stop(timeout_s=HANGS_S)


@pytest.fixture
def torchrun(redis_url, queue, tiny_model, tmp_path) -> Iterator[Callable[[], Torchrun]]:
    started: list[Torchrun] = []

    def start() -> Torchrun:
        settings = {"redis_url": redis_url, "queue": queue, "model": tiny_model, "device": "cpu"}
        settings |= {"dtype": "float32", "http_port": -1, "lease_s": 2.0, "kv_cache_bytes": 8 << 20}
        started.append(Torchrun(tmp_path / "torchrun.log", settings | {"worker_id": "ranks"}))
        return started[-1]

    yield start
    for each in started:
        each.stop()


@pytest.fixture
async def client(redis_url) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        yield client


async def serving(worker: Torchrun, client: redis.asyncio.Redis, queue: str, *jobs: Job) -> None:
    """Returns when the last of `jobs` has 30 tokens."""
    keys = Keys(queue)
    for job in jobs:
        await client.xadd(keys.jobs("normal"), {"job": encode_job(job)})

    async def position() -> int:
        return int(await client.hget(keys.job(jobs[-1].id), "position") or 0)

    async def has_begun() -> bool:
        assert worker.running, worker.log
        return await position() >= 30

    await wait_until_async(has_begun, START_TIMEOUT_S, what="tokens of two ranks")


async def end_of(worker: Torchrun) -> None:
    await wait_until_async(lambda: not worker.running, what="the end of all ranks")


async def logged_token_ids(worker: Harness, job: Job) -> list[int]:
    return [token_id for event in (await worker.events(job.id))[:-1] for token_id in event.token_ids]


async def test_two_ranks_serve_and_hand_over_at_sigterm(harness, torchrun, client, queue, tiny_engine):
    worker = torchrun()
    await serving(worker, client, queue, *SHORT, LONG)
    worker.terminate()
    await end_of(worker)
    assert "worker drained" in worker.log and "rank failed" not in worker.log

    heir = await harness()
    for job in (*SHORT, LONG):
        assert await logged_token_ids(heir, job) == alone(tiny_engine(), job)[0]
    attempts = [(await heir.end(job.id)).timings["attempts"] for job in (*SHORT, LONG)]
    assert attempts == [1, 1, 2]


@pytest.mark.parametrize(("rank", "last_words"), [(0, "rank failed"), (1, "worker drained")])
async def test_nothing_is_lost_when_a_rank_is_killed(
    rank, last_words, harness, torchrun, client, queue, tiny_engine
):
    """The other notices, says so and ends. Is that rank 0, it hands over; else the job's lease runs out."""
    worker = torchrun()
    await serving(worker, client, queue, LONG)
    os.kill(worker.pid(rank), signal.SIGKILL)
    await end_of(worker)
    assert last_words in worker.log

    heir = await harness()
    assert await logged_token_ids(heir, LONG) == alone(tiny_engine(), LONG)[0]
