"""The gateway's own metrics."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from ingine.gateway.keys import create_key
from tests.gateway.serving import serving
from tests.gateway.test_completions import ASKED, CHAT, answer
from tests.gateway.test_errors import assert_error


async def samples(http) -> dict[tuple, float]:
    response = await http.get("/metrics")
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


async def test_requests_are_counted_by_path_and_status(http, worker):
    await asyncio.gather(http.post(CHAT, json=ASKED | {"stream": True}), answer(worker))
    await http.post(CHAT, json={})
    for name in ("/a", "/b"):
        await http.get(name)
        await http.request(name.removeprefix("/"), CHAT)
    found = await samples(http)

    def number(path: str, status: str, method: str) -> float:
        labels = (("method", method), ("path", path), ("status", status))
        return found["ingine_gateway_requests_total", *labels]

    assert number(CHAT, "200", "POST") == number(CHAT, "400", "POST") == 1
    assert number("other", "404", "other") == number(CHAT, "405", "other") == 2
    chat = (("method", "POST"), ("path", CHAT))
    assert found["ingine_gateway_first_byte_seconds_count", *chat] == 2
    assert found["ingine_gateway_request_seconds_sum", *chat] > 0
    assert found["ingine_gateway_requests_in_flight",] == 1  # that of the metrics themselves


async def test_with_keys_metrics_need_one(settings, tmp_path):
    path = tmp_path / "keys.json"
    _, key = create_key(path, tenant=None, models=None)
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        assert_error(await http.get("/metrics"), 401, "invalid_api_key")
        http.headers["authorization"] = f"Bearer {key}"
        assert await samples(http)
