"""A response that is read across ten kills of gateways and workers is the one that nothing has disturbed."""

import json
from collections.abc import Iterator

import httpx2
import pytest

from ingine.producer import Client
from ingine.worker.identity import name_of
from ingine.worker.local import LocalWorkers
from tests.gateway.processes import GatewayProcess
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

PATH = "/v1/responses"
WORKERS = ("one", "two", "three")
ASKED = {"model": "tiny", "input": "hi", "max_output_tokens": 400, "temperature": 0, "ignore_eos": True}
NUM_KILLS = 10
KILLS_A_WORKER = (0, 1)
"""The first ones, while the job runs. The others kill a gateway."""
EVENTS_BETWEEN_KILLS = 8


class Reader:
    """Reads a response, and goes on after the last event that it has."""

    def __init__(self):
        self.events: list[dict] = []

    def read(self, url: str, number: int | None) -> Iterator[None]:
        """Read events, and stop for each `number` of them; None reads to the end."""
        with httpx2.Client(timeout=HANGS_S) as http, http.stream("GET", url, params=self._query) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(json.loads(line.removeprefix("data: ")))
                    if number and len(self.events) % number == 0:
                        yield

    @property
    def _query(self) -> dict:
        after = self.events[-1]["sequence_number"] if self.events else -1
        return {"stream": "true", "starting_after": after}


@pytest.fixture
def workers(redis_url, queue, tmp_path) -> Iterator[LocalWorkers]:
    model = make_tiny_model(tmp_path / "tiny", num_layers=8)
    served = {"redis_url": redis_url, "queue": queue, "model": model, "dtype": "float32", "lease_s": 1.0}
    with LocalWorkers(WORKERS, folder=tmp_path, num_threads=1, **served) as workers:
        yield workers


def test_ten_kills(redis_url, queue, tmp_path, workers):
    gateways = []

    def start() -> GatewayProcess:
        gateways.append(GatewayProcess(tmp_path / f"gateway-{len(gateways)}.log", redis_url, queue))
        return gateways[-1]

    try:
        gateway, reader = start(), Reader()
        with httpx2.Client(timeout=HANGS_S) as http, Client(redis_url, queue=queue) as client:
            job_id = http.post(gateway.url + PATH, json=ASKED | {"background": True}).json()["id"]
            reading = reader.read(f"{gateway.url}{PATH}/{job_id}", EVENTS_BETWEEN_KILLS)
            for kill in range(NUM_KILLS):
                next(reading)
                if kill in KILLS_A_WORKER:
                    workers.kill(name_of(client.status(job_id).worker))
                    continue
                gateway.child.kill()
                reading.close()
                gateway = start()
                reading = reader.read(f"{gateway.url}{PATH}/{job_id}", EVENTS_BETWEEN_KILLS)
            for _ in reading:
                pass
            undisturbed = http.post(gateway.url + PATH, json=ASKED).json()
            replayed = Reader()
            for _ in replayed.read(f"{gateway.url}{PATH}/{job_id}", None):
                pass
    finally:
        for each in gateways:
            each.child.stop()
    assert reader.events == replayed.events
    numbers = [event["sequence_number"] for event in reader.events]
    assert numbers == sorted(set(numbers))
    text = "".join(event["delta"] for event in reader.events if event["type"] == "response.output_text.delta")
    assert text == text_of(undisturbed) == text_of(reader.events[-1]["response"])
    assert undisturbed["usage"]["output_tokens"] == 400


def text_of(response: dict) -> str:
    return response["output"][0]["content"][0]["text"]
