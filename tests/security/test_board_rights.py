"""What `ingine top` reads for each role: the queue for all, jobs and outputs for those that may read them."""

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient
from ingine.producer.watch import QueueWatch
from tests.producer.fake_worker import FakeWorker


@pytest.mark.parametrize(
    ("role", "texts", "refused"),
    [("producer", ["<1><2>"], False), ("operator", [""], True), ("observer", [], True)],
)
async def test_a_board_shows_what_its_user_may_read(acl_server, queue, role, texts, refused):
    keys, url = Keys(queue), acl_server.url("producer")
    admin_url = f"redis://admin:admin@127.0.0.1:{acl_server.port}/0"
    async with Redis.from_url(admin_url) as admin, AsyncClient(url, queue=queue) as client:
        beat = {"state": "serving", "at_s": (await admin.time())[0], "num_jobs": 1}
        await admin.hset(keys.workers, "fake", msgpack.packb(beat))
        worker = FakeWorker(admin, keys)
        await client.submit("hi", job_id="a", tenant="acme")
        await worker.take()
        await worker.commit("a", 0, 2)
        await client.submit("hi", job_id="b", tenant="acme")
    async with AsyncClient(acl_server.url(role), queue=queue) as client:
        watch = QueueWatch(client)
        snapshot = await watch.read(with_text=True)
        assert snapshot.info.num_serving == 1
        assert [job.text for job in snapshot.jobs] == texts
        assert bool(snapshot.refused) == refused
        assert (await watch.waiting_tenants(snapshot.info)).total() == (0 if role == "observer" else 1)
