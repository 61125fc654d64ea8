"""Fixtures with real worker processes and a server of their own, which tests may stop and kill."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.producer import Client
from ingine.sampling_params import SamplingParams
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.local import LocalWorkers
from tests.servers import durable_server
from tests.tiny_models import make_tiny_model

LEASE_S = 1.0
LONG = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), num_layers=4)


@pytest.fixture
def server(tmp_path) -> Iterator[EmbeddedServer]:
    with durable_server(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def client(server, queue) -> Iterator[Client]:
    with Client(server.url, queue=queue) as client:
        yield client


@pytest.fixture
def workers(server, queue, tiny_model, tmp_path) -> Callable[..., LocalWorkers]:
    """`with workers("a", "b") as local:` runs two workers. Keywords are fields of WorkerSettings."""

    def make(*names: str, **settings) -> LocalWorkers:
        defaults = {"model": tiny_model, "dtype": "float32", "lease_s": LEASE_S, "max_num_seqs": 32}
        return LocalWorkers(
            names, redis_url=server.url, queue=queue, folder=tmp_path, num_threads=1, **defaults | settings
        )

    return make


@pytest.fixture(scope="session")
def uninterrupted(tiny_model) -> Callable[[list[str]], list[tuple[list[int], str]]]:
    """Token ids and text of each prompt, from the engine alone."""

    def run(prompts: list[str]) -> list[tuple[list[int], str]]:
        engine = Engine(EngineConfig(model=str(tiny_model), dtype="float32", device="cpu", max_num_seqs=64))
        for number, prompt in enumerate(prompts):
            engine.add(EngineRequest(str(number), engine.tokenizer.encode(prompt), SamplingParams(**LONG)))
        made = [([], "") for _ in prompts]
        while engine.has_unfinished:
            for out in engine.step():
                token_ids, text = made[int(out.seq_id)]
                made[int(out.seq_id)] = (token_ids + out.token_ids, text + out.text + out.final_text)
        return made

    return run
