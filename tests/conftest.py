"""Fixtures for all tests: a real Valkey server per session, a new queue per test. Nothing is ever flushed."""

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

# The same examples each time, and no deadline: the suite must not fail on a slow or busy machine.
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
    """The name of a new queue, which no other test uses."""
    return f"test-{uuid4().hex[:12]}"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compile the native kernels in one of the parallel processes, while the others wait."""
    if hasattr(session.config, "workerinput"):
        with suppress(BuildError):  # without them, tests run on plain torch
            library()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With parallel processes, run files with few tests first: they start programs and take longest.

    If one of them came last, the other processes would wait for it.
    """
    if hasattr(config, "workerinput"):
        num_tests = Counter(item.path for item in items)
        items.sort(key=lambda item: num_tests[item.path])
