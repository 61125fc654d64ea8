"""A client that is used after a fork: the child has connections of its own, the parent keeps its own."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import redis

from ingine.producer import AsyncClient, Client, sync
from ingine.producer.sync import JobHandle
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker

HANGS_S = 60


def in_a_child(work: Callable[[], object]) -> str:
    """Run `work()` in a forked child.

    Returns its result as text, or an error's type and message. Ends a hang.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANGS_S)
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write_end, said.encode())
        gc.collect()  # garbage collection in the child must not affect the parent either
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child hung or died: {status}"
    return said


@pytest.fixture
def client(valkey: Server, queue: str) -> Iterator[Client]:
    with Client(valkey.url, queue=queue) as client:
        yield client


def work_on(valkey: Server, client: Client, job: JobHandle, num_tokens: int, *, end: bool = True) -> None:
    """Take the job as a worker, and commit so many tokens of it."""

    async def work() -> None:
        async with valkey.connect() as redis:
            worker = FakeWorker(redis, (await anext_keys(client)))
            await worker.take()
            if end:
                await worker.run(job.job_id, num_tokens)
            else:
                for n in range(num_tokens):
                    await worker.commit(job.job_id, n, n + 1)

    asyncio.run(work())


async def anext_keys(client: Client):
    from ingine.contract.keys import Keys

    return Keys(client._client.queue)


def test_a_client_that_nobody_has_used_yet_works_in_a_child(client: Client):
    """`gunicorn --preload`, for example, imports the module before the fork."""
    assert in_a_child(lambda: client.submit("hi", job_id="childs").job_id) == "childs"
    assert client.status("childs").status == "queued"


def test_a_client_that_is_in_use_works_in_a_child_and_in_the_parent(client: Client):
    client.submit("hi", job_id="parents")
    for n in range(3):
        assert in_a_child(lambda n=n: client.submit("hi", job_id=f"child-{n}").job_id) == f"child-{n}"
        assert client.status(f"child-{n}").status == "queued"


def test_threads_of_a_child_share_one_client(client: Client):
    client.submit("hi")

    def from_threads() -> int:
        threads = [threading.Thread(target=client.submit, args=("hi",), daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(thread.name == "ingine-client" for thread in threading.enumerate())

    assert in_a_child(from_threads) == "1"
    assert client.queue_info().waiting["normal"] == 9


def test_a_handle_from_before_the_fork_gives_its_result_in_both(valkey: Server, client: Client):
    job = client.submit("hi")
    work_on(valkey, client, job, 3)
    assert in_a_child(lambda: job.result(20).text) == "<1><2><3>"
    assert job.result(20).text == "<1><2><3>"


def test_a_stream_from_before_the_fork_says_in_the_child_how_to_go_on(valkey: Server, client: Client):
    job = client.submit("hi")
    work_on(valkey, client, job, 3)
    stream = job.stream()
    assert next(stream).position == 1
    said = in_a_child(lambda: next(stream))
    assert said.startswith("ClientError")
    assert "another process" in said and "stream(1)" in said
    assert in_a_child(lambda: "".join(chunk.text for chunk in job.stream(1))) == "<2><3>"
    assert [chunk.position for chunk in stream] == [2, 3], "the parent's goes on"


def test_a_stream_that_the_child_throws_away_stays_the_parents(valkey: Server, client: Client):
    job = client.submit("hi")
    work_on(valkey, client, job, 1, end=False)
    streams = [job.stream()]
    assert next(streams[0]).position == 1
    assert in_a_child(lambda: streams.clear()) == "None"
    assert client.cancel(job.job_id) == "requested"


def test_closing_it_in_the_child_leaves_the_parents_open(client: Client):
    job = client.submit("hi")
    assert in_a_child(client.close) == "None"
    assert job.status().status == "queued"

    def use_and_close() -> str:
        with client:
            return client.status(job.job_id).status

    assert in_a_child(use_and_close) == "queued"
    assert job.status().status == "queued"


def test_a_client_closed_before_the_fork_stays_closed(client: Client):
    client.submit("hi")
    client.close()
    assert in_a_child(lambda: client.submit("hi")) == "ClientError: the client is closed"


def test_a_child_that_throws_the_client_away_does_not_reach_the_parents(valkey: Server, queue: str):
    """The child shares an event loop's epoll, so unregistering there would unregister in the parent."""
    admin = redis.Redis.from_url(valkey.url)

    def connections() -> set[str]:
        return {each["id"] for each in admin.client_list() if each["name"] == "ingine-producer"}

    others, clients = connections(), [Client(valkey.url, queue=queue)]
    job_id = clients[0].submit("hi").job_id

    async def throw_away() -> bool:
        """Drop the client in a running loop, where redis-py's connections close themselves when collected."""
        gone = weakref.ref(clients[0])
        clients.clear()
        gc.collect()
        return gone() is None

    def in_a_loop() -> bool:
        gc.disable()
        return asyncio.run(throw_away())

    ours = connections() - others
    assert in_a_child(in_a_loop) == "True"
    assert clients[0].status(job_id).status == "queued"
    assert ours, "the parent has connections"
    assert ours <= connections(), "the parent hears no more from those that it had"
    clients[0].close()
    admin.close()


def test_a_child_of_a_child(client: Client):
    client.submit("hi", job_id="parents")

    def child() -> str:
        client.submit("hi", job_id="childs")
        return in_a_child(lambda: client.submit("hi", job_id="grandchilds").job_id)

    assert in_a_child(child) == "grandchilds"
    assert client.status("grandchilds").status == "queued"


def test_forks_beside_a_busy_thread(client: Client):
    """The child waits for no lock that the other thread holds at that moment."""
    stop = threading.Event()

    def submit_on() -> None:
        while not stop.is_set():
            client.submit("hi")

    busy = threading.Thread(target=submit_on, daemon=True)
    busy.start()
    try:
        for n in range(10):
            assert in_a_child(lambda n=n: client.submit("hi", job_id=f"child-{n}").job_id) == f"child-{n}"
    finally:
        stop.set()
        busy.join()


def test_a_lock_that_is_held_at_the_fork_is_free_in_the_child(client: Client):
    """The lock is held as if another thread were starting a client."""
    with sync._starting:
        assert in_a_child(lambda: client.submit("hi", job_id="childs").job_id) == "childs"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(client: Client, valkey: Server, queue: str, method: str):
    client.submit("hi")
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    target, args = _submit_in_a_process, (valkey.url, queue, answers)
    process = context.Process(target=target, args=args, daemon=True)
    process.start()
    process.join(HANGS_S)
    assert process.exitcode == 0
    assert client.status(answers.get()).status == "queued"


def _submit_in_a_process(url: str, queue: str, answers) -> None:
    answers.put(Client(url, queue=queue).submit("hi").job_id)


def test_a_pool_of_forked_processes_shares_a_client_of_the_module(client: Client):
    global of_the_module
    of_the_module = client
    client.submit("hi")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        job_ids = pool.map_async(_submit_with_the_modules, ["a", "b", "c", "d"]).get(HANGS_S)
    assert [client.status(job_id).status for job_id in job_ids] == ["queued"] * 4


of_the_module: Client


def _submit_with_the_modules(prompt: str) -> str:
    return of_the_module.submit(prompt).job_id


def test_a_client_is_not_for_sending_to_another_process(client: Client):
    for what in (client, client.submit("hi"), client._client):
        with pytest.raises(TypeError, match="make one in each process"):
            pickle.dumps(what)


# --------------------------------------------------------------------------- AsyncClient


def test_an_async_client_works_in_a_child_with_a_loop_of_its_own(valkey: Server, queue: str):
    client = AsyncClient(valkey.url, queue=queue)

    async def submit(job_id: str) -> str:
        return (await client.submit("hi", job_id=job_id)).job_id

    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(submit("parents")) == "parents"
        assert in_a_child(lambda: asyncio.run(submit("childs"))) == "childs"
        said = in_a_child(lambda: loop.run_until_complete(submit("no")))
        assert said.startswith("ClientError") and "asyncio.run" in said
        assert loop.run_until_complete(client.status("childs")).status == "queued"
        loop.run_until_complete(client.aclose())
    finally:
        loop.close()
