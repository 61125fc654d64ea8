"""Fixtures for all tests: a real Valkey server a session, a fresh queue a test (nothing is ever flushed)."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, settings

from ingine.engine.kernels.native.compiler import BuildError
from ingine.worker.embedded import EmbeddedServer
from tests.engine.builds import library
from tests.fake_servers import list_idle_from_the_first_ms_on
from tests.interrupts import heed_interrupts
from tests.servers import durable_server
from tests.triton_interpreter import keep_patched

pytest_plugins = ("tests.path_summary",)

heed_interrupts()

# Without a GPU the Triton kernels run in triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available() and find_spec("triton"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
    keep_patched()

list_idle_from_the_first_ms_on()

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


def pytest_sessionstart(session: pytest.Session) -> None:
    """Of the processes that test in parallel one compiles the native kernels, and the others wait for it."""
    if hasattr(session.config, "workerinput"):
        with suppress(BuildError):  # where they cannot be had, plain torch is tested
            library()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where files are tested in parallel, those of few tests go first: they start programs and take longest.
    Had one of them come last, the other processes would wait for it.
    """
    if hasattr(config, "workerinput"):
        num_tests = Counter(item.path for item in items)
        items.sort(key=lambda item: num_tests[item.path])
