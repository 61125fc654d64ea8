"""Scenarios that chaos cannot include: losses by design, and ends that must be exact."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import msgpack
import pytest
import pytest_asyncio

from ingine.errors import JobFailed, JobNotFound, ServerUnavailable
from ingine.producer import AsyncClient
from tests.chaos import jobs, requests
from tests.chaos.journal import Journal, read
from tests.chaos.outputs import read_answers
from tests.chaos.proxy import HOST
from tests.chaos.run import WORKER
from tests.chaos.seen import Seen
from tests.chaos.servers import Node, Servers
from tests.chaos.zygote import Zygote
from tests.waiting import HANGS_S, wait_until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

SLOW = {"step_s": 0.02}
LONG = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}


class Programs:
    """Real processes. Workers that die are replaced, as by a supervisor."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.zygote = Zygote(folder, self._ended)
        self.ended: dict[str, int] = {}
        self._replacing: dict[str, Callable[[], Awaitable]] = {}
        self._running: set[asyncio.Task] = set()

    async def worker(self, url: str, *, replaced: bool = False, fate: dict | None = None, **settings) -> str:
        """Start a worker, and return its name."""
        name = f"worker-{uuid4().hex[:8]}"
        given = WORKER | {"redis_url": url, "worker_id": name, "model": str(self.folder / "model")} | settings
        if replaced:
            self._replacing[name] = lambda: self.worker(url, replaced=True, fate=fate, **settings)
        await self.zygote.spawn(name, "worker", settings=given, fate=fate or {})
        return name

    async def stop_workers(self) -> None:
        """Stop all workers, so that they do not affect other tests."""
        self._replacing.clear()
        for name in list(self.zygote.pids):
            self.zygote.signal(name, signal.SIGKILL)
        await wait_until_async(lambda: not self.zygote.pids and not self._running)

    def _ended(self, name: str, status: int) -> None:
        self.ended[name] = status
        if replace := self._replacing.pop(name, None):
            starting = asyncio.create_task(replace())
            self._running.add(starting)
            starting.add_done_callback(self._running.discard)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def programs(tmp_path_factory) -> AsyncIterator[Programs]:
    programs = Programs(tmp_path_factory.mktemp("programs"))
    await programs.zygote.start()
    paths = {name: str(programs.folder / name) for name in ("model", "answers")}
    await programs.zygote.spawn("reference", "reference", **paths)
    await wait_until_async(lambda: programs.ended.get("reference") == 0, what="the uninterrupted run")
    yield programs
    await programs.zygote.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def server(tmp_path, programs) -> AsyncIterator[Node]:
    node = await Node(tmp_path / "server").start()
    yield node
    await programs.stop_workers()
    await node.stop()


def url_of(node: Node) -> str:
    return f"redis://{HOST}:{node.port}/0"


async def started(handle) -> bool:
    return (await handle.status()).position > 3


async def test_a_server_that_comes_back_empty(programs, server):
    """All jobs are lost, by the operator's choice of settings: consumers get errors, and workers serve later
    jobs."""
    worker = await programs.worker(url_of(server), fate=SLOW)
    async with AsyncClient(url_of(server), queue=WORKER["queue"]) as client:
        lost = await client.submit("a story without an end", sampling=LONG)
        waiting = asyncio.create_task(lost.result(timeout=HANGS_S))
        await wait_until_async(lambda: started(lost), what="its first tokens")
        await server.kill_and_restart(before_start=lambda: shutil.rmtree(server.folder / "appendonlydir"))
        with pytest.raises(JobNotFound):
            await waiting
        asked = requests.greedy()[0]
        result = await (await client.submit(sampling=asked.sampling, **asked.input)).result(timeout=HANGS_S)
    (output,) = read_answers(programs.folder / "answers")[0].outputs
    assert (result.token_ids, result.text) == (output.token_ids, output.text)
    assert worker in programs.zygote.pids


async def test_a_url_that_points_at_a_replica(programs, server, tmp_path):
    """Nothing is accepted, but no process gives up; once the replica is promoted, they serve."""
    replica = await Node(tmp_path / "replica", replicaof=f"{HOST} {server.port}").start()
    worker = await programs.worker(url_of(replica))
    async with AsyncClient(url_of(replica), queue=WORKER["queue"]) as client:
        with pytest.raises(ServerUnavailable, match="read-only replica"):
            await client.submit("hello", max_tokens=4)
        log = programs.zygote.log(worker)
        await wait_until_async(lambda: "redis failed, retrying" in log.read_text(), what="the worker's word")
        await replica.admin.execute_command("REPLICAOF", "NO", "ONE")
        result = await (await client.submit("hello", sampling=LONG)).result(timeout=HANGS_S)
    assert len(result.token_ids) == LONG["max_tokens"]
    assert worker in programs.zygote.pids
    await programs.stop_workers()
    await replica.stop()


async def test_poison_ends_in_the_dead_letters_and_innocents_finish(programs, server):
    programs.ended.clear()  # processes that earlier tests stopped
    for _ in range(2):
        await programs.worker(url_of(server), replaced=True, max_deaths=3, fate=SLOW)
    asked = requests.greedy()[:6]
    async with AsyncClient(url_of(server), queue=WORKER["queue"]) as client:
        first, *others = [each.input | {"sampling": each.sampling} for each in asked]
        poison = {"prompt": jobs.POISON, "max_tokens": 8, "metadata": {"from": "a test"}}
        handles = await client.submit_many([first, poison, *others])
        bad = handles.pop(1)
        with pytest.raises(JobFailed) as failed:
            await bad.result(timeout=HANGS_S)
        results = [await handle.result(timeout=HANGS_S) for handle in handles]
        letters = await client.dead_letters()
    assert failed.value.code == "worker_lost"
    answers = read_answers(programs.folder / "answers")
    right = [answer.outputs[0] for answer in answers[: len(asked)]]
    assert [(each.token_ids, each.text) for each in results] == [
        (each.token_ids, each.text) for each in right
    ]
    (letter,) = letters
    assert (letter.job_id, letter.code) == (bad.job_id, "worker_lost")
    assert "3 workers" in letter.reason
    assert msgpack.unpackb(letter.job)["metadata"] == {"from": "a test"}
    assert sum(status == -signal.SIGKILL for status in programs.ended.values()) >= 3


async def test_a_consumer_that_does_not_read_is_cut_off_and_misses_nothing(programs, server, tmp_path):
    servers = Servers(tmp_path, None, 0)
    servers.nodes = [server]
    await programs.worker(url_of(server), fate=SLOW)
    async with AsyncClient(url_of(server), queue=WORKER["queue"]) as client:
        handle = await client.submit("a long story", sampling=LONG, job_id="deaf")
        source, journal = tmp_path / "source", tmp_path / "journal"
        Journal(source).write(number=0, job_id=handle.job_id)
        name = f"consumer-{uuid4().hex[:8]}"
        await programs.zygote.spawn(
            name, "consumer", url=url_of(server), queue=WORKER["queue"], journal=str(journal),
            sources=[str(source)], remainder=0, modulus=1, end=1,
        )  # fmt: skip
        await wait_until_async(
            lambda: any("ids" in record for record in read(journal)), what="its first token"
        )
        programs.zygote.signal(name, signal.SIGSTOP)
        await servers.flood(rounds=1000)
        assert servers.num_cut_off
        programs.zygote.signal(name, signal.SIGCONT)
        result = await handle.result(timeout=HANGS_S)
        await wait_until_async(lambda: programs.ended.get(name) == 0, what="the end of its stream")
    seen = Seen()
    for record in read(journal):
        seen.take(record)
    choice = seen.choices[0]
    assert list(choice.token_ids.values()) == result.token_ids and not seen.faults
    assert choice.text + choice.last_text == result.text
