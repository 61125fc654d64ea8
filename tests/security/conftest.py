"""Fixtures of a worker in this process, with its own user, on a server with access control."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.security.acl_server import AclServer
from tests.security.neighbours import NEIGHBOUR
from tests.served_models import TINY
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def acl_server(tmp_path_factory) -> Iterator[AclServer]:
    with AclServer(tmp_path_factory.mktemp("acl")) as server:
        yield server


StartWorker = Callable[..., Awaitable[asyncio.Task]]


@pytest.fixture
async def run_worker(tiny_model, queue) -> AsyncIterator[StartWorker]:
    """A function that starts a worker and returns its task. Workers that still run are stopped at the end."""
    started: list[tuple[Worker, asyncio.Task]] = []

    async def start(redis_url: str, **options) -> asyncio.Task:
        defaults = {"queue": queue, "http_port": -1, "lease_s": 1.0, "worker_id": f"w{len(started)}"}
        settings = WorkerSettings(_env_file=None, **defaults | options)
        config = EngineConfig(
            model=str(tiny_model), dtype="float32", device="cpu", max_num_seqs=8, kv_cache_bytes=8 << 20
        )
        engine = Engine(config)
        worker = Worker(settings, redis_url, EngineThread(lambda: engine), model=TINY)
        started.append((worker, asyncio.create_task(worker.run())))
        return started[-1][1]

    yield start
    for worker, running in started:
        worker.stop()
        async with asyncio.timeout(HANGS_S):
            if not running.done():
                await running


@pytest.fixture
def give_away(monkeypatch) -> Callable[[Path], None]:
    """A function that gives a path to the neighbour, or if not permitted, makes this process appear as
    another user."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, NEIGHBOUR, NEIGHBOUR, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: NEIGHBOUR)

    return give


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A sticky folder that all users can write, like /tmp, and can reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
