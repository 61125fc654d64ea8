"""Fixtures for all tests: a real Valkey server a session, a fresh queue a test (nothing is ever flushed)."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.servers import durable_server
from worker.embedded import EmbeddedServer

# Without a GPU the Triton kernels run in triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available() and find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples each time, and no deadline: a suite on a busy machine must not fail for being slow.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with durable_server(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: EmbeddedServer) -> str:
    return redis_server.url


@pytest.fixture
def queue() -> str:
    """The name of a queue that no other test uses."""
    return f"test-{uuid4().hex[:12]}"
