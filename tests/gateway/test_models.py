"""`/v1/models` lists what workers serve now."""

import time

import msgpack
import pytest

from ingine.errors import NoWorker
from ingine.gateway.keys import create_key
from ingine.gateway.models import Workers
from ingine.producer import AsyncClient
from tests.gateway.serving import serving
from tests.gateway.test_errors import assert_error
from tests.waiting import wait_until_async


async def beat(redis, keys, worker: str, **fields) -> None:
    now_s, _ = await redis.time()
    heartbeat = {"at_s": now_s, "state": "serving", "model": "tiny"} | fields
    await redis.hset(keys.workers, worker, msgpack.packb(heartbeat))


@pytest.fixture
async def served(redis, keys):
    await beat(redis, keys, "a")
    await beat(redis, keys, "b")
    await beat(redis, keys, "c", model="org/other")
    await beat(redis, keys, "d", model="leaving", state="draining")
    await beat(redis, keys, "e", model="gone", at_s=1)


async def test_models_of_workers_that_serve(served, http):
    began = int(time.time())
    body = (await http.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["org/other", "tiny"]
    for model in body["data"]:
        assert model["object"] == "model" and model["owned_by"] == "ingine" and model["created"] >= began
    assert (await http.get("/v1/models/tiny")).json() == body["data"][1]
    assert (await http.get("/v1/models/org/other")).json() == body["data"][0]
    error = assert_error(await http.get("/v1/models/gone"), 404, "model_not_found")
    assert error["param"] == "model"


async def test_without_workers_the_list_is_empty(http):
    assert (await http.get("/v1/models")).json() == {"object": "list", "data": []}


async def test_a_key_sees_the_models_that_it_may_use(served, settings, tmp_path):
    path = tmp_path / "keys.json"
    _, key = create_key(path, tenant=None, models=["tiny", "another"])
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        headers = {"authorization": f"Bearer {key}"}
        body = (await http.get("/v1/models", headers=headers)).json()
        assert [model["id"] for model in body["data"]] == ["tiny"]
        assert_error(await http.get("/v1/models/org/other", headers=headers), 404, "model_not_found")


async def test_a_server_that_is_away_is_no_fault_of_the_client(settings):
    away = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    async with serving(away) as http:
        response = await http.get("/v1/models")
        error = assert_error(response, 503, "server_unavailable")
        assert "127.0.0.1" not in error["message"] and response.headers["retry-after"] == "1"


async def test_a_worker_that_has_gone_is_noticed(redis, keys, settings):
    """Also where each request finds a worker that served lately: one of them reads the workers again."""
    await beat(redis, keys, "a", at_s=2**40)
    async with AsyncClient(settings.redis_url, queue=settings.queue) as client:
        workers = Workers(client)
        await workers.require()
        await redis.delete(keys.workers)

        async def is_refused() -> bool:
            try:
                await workers.require()
            except NoWorker:
                return True
            return False

        await wait_until_async(is_refused)
        await workers.aclose()
