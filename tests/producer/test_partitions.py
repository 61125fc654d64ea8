"""A queue with several partitions, on one server and in a cluster: each job is in its partition, and found
there."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from functools import partial
from typing import NamedTuple

import msgpack
import pytest

from ingine.cli.batch_progress import make_progress
from ingine.connect.servers import Servers
from ingine.contract.events import TokensEvent
from ingine.contract.keys import Keys, all_partitions, keys_of, partition_of
from ingine.producer import (
    AsyncClient,
    Client,
    ClientError,
    DuplicateJob,
    InvalidJob,
    JobCancelled,
    JobNotFound,
    QueueFull,
    Reply,
)
from ingine.producer.batch import Batch
from ingine.producer.batch_input import InputFile
from ingine.producer.partitions import Partitions
from ingine.producer.streams import Streams
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_cli import start
from tests.producer.test_control import bury
from tests.servers import Cluster, cluster
from tests.waiting import HANGS_S, wait_until_async

NUM_PARTITIONS = 4


class Place(NamedTuple):
    """The server of the test's queue, and a connection of the test's own."""

    url: str
    servers: Servers
    queue: str
    partitions: list[Keys]

    def worker(self, keys: Keys) -> FakeWorker:
        return FakeWorker(self.servers.client(keys), keys)

    def worker_of(self, job_id: str) -> FakeWorker:
        return self.worker(keys_of(self.queue, job_id, NUM_PARTITIONS))

    async def settings(self, keys: Keys, *names: str) -> list[bytes | None]:
        return await self.servers.client(keys).hmget(keys.settings, names)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture(params=["one server", "cluster"])
async def place(request: pytest.FixtureRequest, queue: str) -> AsyncIterator[Place]:
    if request.param == "cluster":
        url = request.getfixturevalue("three").url
    else:
        url = request.getfixturevalue("redis_url")
    servers = Servers(url, client_name="ingine-test", retries=5)
    yield Place(url, servers, queue, all_partitions(queue, NUM_PARTITIONS))
    await servers.aclose()


@pytest.fixture
async def client(place: Place) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(place.url, queue=place.queue) as client:
        await client.set_partitions(NUM_PARTITIONS)
        yield client


def id_in(partition: int, name: str = "job") -> str:
    """A job id that belongs to the partition."""
    candidates = (f"{name}-{n}" for n in range(10_000))
    return next(job_id for job_id in candidates if partition_of(job_id, NUM_PARTITIONS) == partition)


async def test_each_job_lives_in_its_partition_and_is_followed_there(client: AsyncClient, place: Place):
    handles = [await client.submit("hi", job_id=id_in(n)) for n in range(NUM_PARTITIONS)]
    results = [asyncio.create_task(handle.result()) for handle in handles]
    for keys, handle in zip(place.partitions, handles, strict=True):
        worker = place.worker(keys)
        assert (await worker.take()).id == handle.job_id
        await worker.run(handle.job_id, 2)
    assert [(await result).token_ids for result in results] == [[1, 2]] * NUM_PARTITIONS
    assert {(await handle.status()).status for handle in handles} == {"finished"}


async def test_many_at_once_go_where_they_belong(client: AsyncClient, place: Place):
    job_ids = [f"many-{n}" for n in range(300)]
    handles = await client.submit_many({"prompt": "hi", "job_id": job_id} for job_id in job_ids)
    assert [handle.job_id for handle in handles] == job_ids
    info = await client.queue_info()
    assert (info.waiting["normal"], info.num_partitions) == (300, NUM_PARTITIONS)
    assert info.num_bytes > 300
    for keys in place.partitions:
        num_jobs = await place.servers.client(keys).xlen(keys.jobs("normal"))
        assert num_jobs == sum(keys_of(place.queue, job_id, NUM_PARTITIONS) == keys for job_id in job_ids)


async def test_one_full_partition_refuses_its_own_jobs_alone(client: AsyncClient):
    await client.set_limits(max_jobs=1)
    first, *others = [id_in(n) for n in range(NUM_PARTITIONS)]
    await client.submit("hi", job_id=first)
    jobs = [{"prompt": "hi", "job_id": job_id} for job_id in (others[0], id_in(0, "more"), *others[1:])]
    with pytest.raises(QueueFull, match="limit of 1 jobs") as full:
        await client.submit_many(jobs)
    assert [handle.job_id for handle in full.value.accepted] == others
    with pytest.raises(DuplicateJob):
        await client.submit("hi", job_id=first)


async def test_an_idempotency_key_decides_where_its_job_lives(client: AsyncClient):
    for n in range(8):
        once = await client.submit("hi", idempotency_key=f"key-{n}")
        [again] = await client.submit_many([{"prompt": "hi", "idempotency_key": f"key-{n}"}])
        assert again.job_id == once.job_id
        assert partition_of(once.job_id, NUM_PARTITIONS) == partition_of(f"key-{n}", NUM_PARTITIONS)
    with pytest.raises(InvalidJob, match="not both"):
        await client.submit("hi", idempotency_key="key", job_id="mine")
    assert (await client.queue_info()).waiting["normal"] == 8


async def test_jobs_are_cancelled_where_they_live(client: AsyncClient, place: Place):
    for n in range(NUM_PARTITIONS):
        handle = await client.submit("hi", job_id=id_in(n), metadata={"n": n})
        assert await handle.cancel() == "cancelled"
        running = await client.submit("hi", job_id=id_in(n, "running"))
        await place.worker(place.partitions[n]).take()
        assert await running.cancel() == "requested"
    with pytest.raises(JobNotFound):
        await client.cancel("nobody")


async def test_switches_are_set_and_nudged_in_every_partition(client: AsyncClient, place: Place):
    await client.set_limits(max_bytes=9999, max_jobs_per_s=0.5, weights={"big": 3, "small": 0.5})
    for keys in place.partitions:
        redis = place.servers.client(keys)
        await redis.hset(keys.workers, "w1", msgpack.packb({"at_s": 0}))
        async with redis.pubsub() as pubsub:
            await pubsub.ssubscribe(keys.control)
            await pubsub.get_message(timeout=HANGS_S)
            await client.pause()
            nudge = await pubsub.get_message(timeout=HANGS_S)
            assert msgpack.unpackb(nudge["data"]) == {"command": "pause"}
    await client.drain("w1")
    for keys in place.partitions:
        assert await place.settings(keys, "paused", "drain:w1", "weight:big") == [b"1", b"1", b"3"]
    info = await client.queue_info()
    assert (info.paused, info.draining, list(info.workers)) == (True, ["w1"], ["w1"])
    assert (info.max_bytes, info.max_jobs_per_s) == (9999, 0.5)
    assert info.weights == {"big": 3.0, "small": 0.5}
    await client.resume()
    assert not (await client.queue_info()).paused


async def test_dead_letters_of_all_partitions(client: AsyncClient, place: Place):
    expected = []
    for n in (2, 0, 3, 1):
        keys = place.partitions[n]
        entry_id = await bury(place.servers.client(keys), keys, msgpack.packb({"id": f"dead-{n}"}))
        expected.append(f"{n}:{entry_id}")
    letters = await client.dead_letters()
    assert sorted(letter.entry_id for letter in letters) == sorted(expected)
    times = [letter.entry_id.partition(":")[2] for letter in letters]
    assert times == sorted(times)
    assert len(await client.dead_letters(2)) == 2

    assert (await client.dead_letter(expected[0])).job_id == "dead-2"
    for unknown in (expected[0].partition(":")[2], "9:1-1", "x:1-1"):
        with pytest.raises(ClientError, match="no dead letter"):
            await client.dead_letter(unknown)
    await client.requeue(expected[0])
    low = place.partitions[2].jobs("low")
    assert await place.servers.client(place.partitions[2]).xlen(low) == 1
    assert await client.purge(expected[1:3]) == 2
    assert await client.purge() == 1


async def test_replies_of_all_partitions_from_any_position(client: AsyncClient, place: Place):
    async def end(n: int, name: str) -> str:
        job = await client.submit("hi", job_id=id_in(n, name), reply_to="mine", metadata={"n": n})
        await job.cancel()
        return job.job_id

    async def read(num_replies: int, position: str = "") -> dict[str, Reply]:
        async with aclosing(client.replies("mine", position)) as replies:
            return {(reply := await anext(replies)).job_id: reply for _ in range(num_replies)}

    early = [await end(n, "early") for n in range(NUM_PARTITIONS)]
    replies = await read(NUM_PARTITIONS)
    assert sorted(replies) == sorted(early)
    assert [replies[job_id].metadata for job_id in early] == [{"n": n} for n in range(NUM_PARTITIONS)]
    assert {reply.status for reply in replies.values()} == {"cancelled"}

    *_, second, last = replies.values()
    assert list(await read(1, second.position)) == [last.job_id]
    waiting = asyncio.create_task(read(2, last.position))
    late = [await end(n, "late") for n in (3, 1)]
    assert sorted(await waiting) == sorted(late)
    assert sorted(await read(NUM_PARTITIONS + 2)) == sorted(early + late)
    with pytest.raises(ValueError, match="of 2 partitions, and the queue has 4"):
        await read(1, "0,0")


def test_replies_without_an_event_loop(redis_url: str, queue: str):
    with Client(redis_url, queue=queue) as client:
        for n in range(2):
            client.submit("hi", job_id=f"{n}", reply_to="mine").cancel()
        replies = client.replies("mine")
        assert [next(replies).job_id for _ in range(2)] == ["0", "1"]


async def test_one_who_follows_replies_learns_of_another_number(
    client: AsyncClient, place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.replies.BLOCK_MS", 20)
    async with AsyncClient(place.url, queue=place.queue) as other:
        await other.queue_info()
        await client.set_partitions(1)
        job = await client.submit("hi", reply_to="mine")
        await job.cancel()
        async with aclosing(other.replies("mine")) as replies:
            assert (await anext(replies)).job_id == job.job_id
            await client.set_partitions(2)
            with pytest.raises(ClientError, match="another number of partitions now"):
                await asyncio.wait_for(anext(replies), HANGS_S)


async def test_waiting_for_replies_holds_up_nobody_and_ends_with_the_client(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.replies.BLOCK_MS", 1000 * 3600)
    waiting = [asyncio.ensure_future(anext(client.replies(f"r{n}"))) for n in range(16)]
    await wait_until_async(lambda: len(client._session.replies._reads) >= 16, what="all of them waiting")
    async with asyncio.timeout(HANGS_S):
        for n in range(NUM_PARTITIONS):
            await client.submit("hi", job_id=id_in(n))
        await client.aclose()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert {str(end) for end in ends} == {"the client is closed"}


async def test_what_is_no_reply_is_an_error(client: AsyncClient, place: Place):
    keys = place.partitions[2]
    await place.servers.client(keys).xadd(keys.replies("mine"), {"event": b"nonsense"})
    with pytest.raises(ClientError, match="no event"):
        await anext(client.replies("mine"))


# --------------------------------------------------------------------------- another number of them


async def test_others_learn_of_another_number_when_they_need_it(client: AsyncClient, place: Place):
    async with AsyncClient(place.url, queue=place.queue) as other:
        assert (await other.queue_info()).num_partitions == NUM_PARTITIONS
        await client.set_limits(max_jobs=77)
        for number in (2, 1, 3, NUM_PARTITIONS):
            await client.set_partitions(number)
            job = await client.submit("found by its id")
            assert (await other.status(job.job_id)).status == "queued"
            assert await job.cancel() == "cancelled"
            await client.set_partitions(number)  # a repeat has no effect
            [again] = await other.submit_many([{"prompt": "accepted at once"}])
            assert (await client.queue_info()).max_jobs == 77
            await again.cancel()


async def test_all_who_look_at_once_learn_of_another_number(client: AsyncClient, place: Place):
    await client.set_partitions(1)
    async with AsyncClient(place.url, queue=place.queue) as other:
        await other.queue_info()
        await client.set_partitions(NUM_PARTITIONS)
        jobs = [await client.submit("hi", job_id=id_in(n)) for n in range(NUM_PARTITIONS)] * 2
        infos = await asyncio.gather(*(other.status(job.job_id) for job in jobs))
        assert {info.status for info in infos} == {"queued"}
    async with AsyncClient(place.url, queue=place.queue) as other:
        await other.queue_info()
        for job in jobs:
            await job.cancel()
        await client.set_partitions(1)
        job = await client.submit("hi")
        streams = [other.attach(job.job_id).result() for _ in range(8)]
        await job.cancel()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert {type(end) for end in ends} == {JobCancelled}


async def test_an_operator_steers_and_sees_the_places_of_now(client: AsyncClient, place: Place):
    await client.set_partitions(1)
    async with AsyncClient(place.url, queue=place.queue) as other:

        async def now() -> list[list[bytes | None]]:
            return [await place.settings(keys, "paused", "max_jobs", "drain:w1") for keys in place.partitions]

        async def from_before(method: str, *args, **kwargs):
            """Call the method with a client that has read another number."""
            other._partitions._known = other._partitions.among(1)
            return await getattr(other, method)(*args, **kwargs)

        await client.set_partitions(NUM_PARTITIONS)
        last = place.partitions[-1]
        redis = place.servers.client(last)
        await redis.hset(last.workers, "w1", msgpack.packb({"at_s": 0}))
        await from_before("pause")
        await from_before("set_limits", max_jobs=3)
        await from_before("drain", "w1")
        assert await now() == [[b"1", b"3", b"1"]] * NUM_PARTITIONS
        await from_before("resume")
        assert await now() == [[None, b"3", b"1"]] * NUM_PARTITIONS

        entry_ids = [f"{NUM_PARTITIONS - 1}:{await bury(redis, last, b'x')}" for _ in range(4)]
        assert [letter.entry_id for letter in await from_before("dead_letters")] == entry_ids
        assert (await from_before("dead_letter", entry_ids[0])).entry_id == entry_ids[0]
        assert await from_before("requeue", entry_ids[0])
        assert await from_before("purge", entry_ids[1:2]) == 1
        assert await from_before("purge") == 2


async def test_a_stream_finds_a_job_in_the_new_place(client: AsyncClient, place: Place):
    async with AsyncClient(place.url, queue=place.queue) as other:
        await client.set_partitions(1)
        await other.queue_info()
        await client.set_partitions(NUM_PARTITIONS)
        handle = await client.submit("hi", job_id=id_in(3))
        worker = place.worker_of(handle.job_id)
        await worker.take()
        await worker.run(handle.job_id, 2)
        assert (await other.attach(handle.job_id).result(HANGS_S)).token_ids == [1, 2]


async def test_only_an_empty_queue_is_partitioned_anew(client: AsyncClient, place: Place):
    last = place.partitions[-1]
    waiting = await client.submit("hi", job_id=id_in(NUM_PARTITIONS - 1))
    with pytest.raises(ClientError, match=r"not empty \(1 jobs in .*jobs:normal\): nothing was changed"):
        await client.set_partitions(2)
    await client.submit("still accepted", job_id=id_in(0))
    await client.cancel(id_in(0))
    await waiting.cancel()
    later = await client.submit("hi", job_id=id_in(NUM_PARTITIONS - 1, "later"), not_before_s=1000)
    with pytest.raises(ClientError, match=r"not empty \(1 delayed jobs\)"):
        await client.set_partitions(2)
    await later.cancel()
    await bury(place.servers.client(last), last, b"x")
    with pytest.raises(ClientError, match=r"not empty \(1 dead letters\)"):
        await client.set_partitions(2)
    await client.purge()
    await client.set_partitions(2)
    for wrong in (0, 65):
        with pytest.raises(ValueError, match="1 to 64 partitions"):
            await client.set_partitions(wrong)


async def test_nothing_stays_of_what_an_earlier_number_had_set(client: AsyncClient, place: Place):
    await client.set_limits(max_jobs=5, weights={"gone": 2})
    await client.pause()
    await client.set_partitions(2)
    assert (await client.queue_info()).paused
    await client.resume()
    first = place.partitions[0]
    await place.servers.client(first).hdel(first.settings, "weight:gone")
    await client.set_partitions(NUM_PARTITIONS)
    for keys in (*place.partitions, Keys(place.queue)):
        settings = await place.servers.client(keys).hgetall(keys.settings)
        assert settings == {b"partitions": b"%d" % NUM_PARTITIONS, b"max_jobs": b"5"}


async def test_a_switch_of_one_partition_shows(client: AsyncClient, place: Place):
    keys = place.partitions[2]
    await place.servers.client(keys).hset(keys.settings, mapping={"paused": 1, "drain:w1": 1})
    info = await client.queue_info()
    assert (info.paused, info.draining) == (True, ["w1"])


async def test_a_refused_change_closes_no_partition(client: AsyncClient, place: Place):
    """No partition is closed even for a moment: undoing that could open one that was closed before."""
    first = place.partitions[0]
    await place.servers.client(first).hset(first.settings, "partitions", 7)
    await client.submit("hi", job_id=id_in(NUM_PARTITIONS - 1))
    with pytest.raises(ClientError, match="not empty"):
        await client.set_partitions(2)
    assert await place.settings(first, "partitions") == [b"7"]


async def test_a_change_that_broke_off_is_completed_by_another(
    client: AsyncClient, place: Place, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ingine.producer.submitter.MAX_ATTEMPTS", 2)
    closed = place.partitions[1]
    await place.servers.client(closed).hset(closed.settings, "partitions", 2)
    with pytest.raises(ClientError, match="complete the change with `ingine queue partition`"):
        await client.submit("hi", job_id=id_in(1))
    await client.set_partitions(2)
    await client.submit("hi", job_id=id_in(1))


@pytest.mark.parametrize("look", ["status", "cancel", "result"])
async def test_a_number_that_goes_on_changing_is_not_followed_for_ever(
    client: AsyncClient, place: Place, monkeypatch: pytest.MonkeyPatch, look: str
):
    queue, latest, num_asked = Keys(place.queue), Partitions.latest, 0

    async def changed_meanwhile(self):
        nonlocal num_asked
        num_asked += 1
        assert num_asked < 1000, "it would go on for ever"
        number = NUM_PARTITIONS - num_asked % 2
        await place.servers.client(queue).hset(queue.settings, "partitions", number)
        return await latest(self)

    monkeypatch.setattr(Partitions, "latest", changed_meanwhile)
    clock = asyncio.get_running_loop().time
    began = clock()
    with pytest.raises(ClientError, match=r"number of partitions .* is being changed"):
        await getattr(client.attach(id_in(NUM_PARTITIONS - 1)), look)()
    assert clock() - began >= 0.2, "ten tries at once would not outlast a change"


async def test_a_long_stream_may_move_as_often_as_it_has_events(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    """After each move its events are found again, so the limit of moves does not apply."""
    monkeypatch.setattr("ingine.producer.streams.MAX_MOVES", 2)

    async def one_event_then_gone(self, partition, job_id, position, choices, at_end):
        yield TokensEvent(position + 1, [1], "x")
        raise JobNotFound(job_id)

    async def moved(self, job_id, before):
        return True

    monkeypatch.setattr(Streams, "_follow", one_event_then_gone)
    monkeypatch.setattr(Partitions, "moved", moved)
    positions = []
    async for chunk in client.attach("a").stream():
        positions.append(chunk.position)
        if len(positions) == 5:
            break
    assert positions == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------- what lies above


async def test_a_batch(client: AsyncClient, place: Place, tmp_path):
    lines = [
        {"custom_id": f"{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": f"{n}"}}
        for n in range(12)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    paths = [tmp_path / name for name in ("in.jsonl", "out.jsonl", "errors.jsonl")]
    workers = [place.worker(keys) for keys in place.partitions]
    serving = [asyncio.create_task(worker.serve(lambda w, job: w.run(job.id, 2))) for worker in workers]
    summary = await Batch(client, InputFile(paths[0]), *paths[1:], progress=make_progress(), window=256).run()
    assert (summary.num_lines, summary.num_failed) == (12, 0)
    for worker in workers:
        worker.stop()
    await asyncio.gather(*serving)


async def test_commands(place: Place):
    async def ingine(*arguments: str) -> tuple[int, str]:
        process = await start(*arguments, "--redis-url", place.url, "--queue", place.queue)
        stdout, stderr = await process.communicate()
        return process.returncode, (stdout + stderr).decode()

    assert await ingine("queue", "partition", str(NUM_PARTITIONS)) == (0, "")
    exit_status, job_id = await ingine("submit", "hi")
    assert exit_status == 0
    assert "status:            queued" in (await ingine("status", job_id.strip()))[1]
    shown = (await ingine("queue", "show"))[1]
    assert f"queue {place.queue}, {NUM_PARTITIONS} partitions\n" in shown
    assert "1 waiting" in shown
    assert (await ingine("queue", "partition", "2"))[0] == 1
    assert await ingine("cancel", job_id.strip()) == (0, "cancelled\n")


async def test_a_stream_goes_on_when_its_partition_moves(
    three: Cluster, queue: str, monkeypatch: pytest.MonkeyPatch
):
    """It gets live events again, too: in this test, silence causes no read of the log."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 1000.0)
    servers = Servers(three.url, client_name="ingine-test", retries=5)
    async with AsyncClient(three.url, queue=queue) as client:
        handle = await client.submit("hi")
        worker = FakeWorker(servers.client(Keys(queue)), Keys(queue))
        await worker.take()
        chunks, channel = handle.stream(), Keys(queue).channel(handle.job_id)
        await worker.commit(handle.job_id, 0, 1)
        assert (await anext(chunks)).token_ids == [1]
        for position in (1, 2):
            await asyncio.to_thread(three.move, Keys(queue).settings)
            waiting = asyncio.ensure_future(anext(chunks))
            subscribed = partial(three.owner(channel).admin.execute_command, "PUBSUB SHARDCHANNELS", channel)
            await wait_until_async(subscribed, what="a subscription at the new node")
            await worker.commit(handle.job_id, position, position + 1)
            assert (await waiting).token_ids == [position + 1]
        await worker.end(handle.job_id, 3)
        assert [chunk async for chunk in chunks] == []
    await servers.aclose()
