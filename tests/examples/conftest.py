"""Fixtures of the examples: a worker with a tiny model for all, and running an example as a reader would."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingine.producer import Client
from ingine.worker.local import LocalWorkers
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUEUE = "examples"


@pytest.fixture(scope="session")
def served_url(redis_url, tmp_path_factory) -> Iterator[str]:
    """The URL of a server with a worker on queue `examples`."""
    folder = tmp_path_factory.mktemp("examples")
    model = make_tiny_model(folder / "tiny", num_layers=4)
    settings = {"model": model, "dtype": "float32"}
    with LocalWorkers(
        ["examples"], redis_url=redis_url, queue=QUEUE, folder=folder, num_threads=1, **settings
    ):
        yield redis_url


@pytest.fixture
def client(served_url) -> Iterator[Client]:
    with Client(served_url, queue=QUEUE) as client:
        yield client


@pytest.fixture(scope="session")
def environment(served_url) -> dict[str, str]:
    return os.environ | {"INGINE_REDIS_URL": served_url, "INGINE_QUEUE": QUEUE}


@pytest.fixture
def run_example(environment) -> Callable[[str], str]:
    """Run a Python example to its end, and return what it printed."""

    def run(name: str) -> str:
        ended = subprocess.run(
            [sys.executable, EXAMPLES / name],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANGS_S,
        )
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    return run
