"""The command `ingine worker`. Its flags are made from `ingine.worker.settings`."""

import gc
import itertools
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ingine.cli.settings_command import SettingsCommand
from ingine.worker.frozen_imports import frozen_imports

if TYPE_CHECKING:
    from ingine.engine.config import EngineConfig
    from ingine.engine.text.tokenizer import Tokenizer
    from ingine.worker.hosting.engine_link import EngineHost
    from ingine.worker.served_model import ServedModel
    from ingine.worker.settings import WorkerSettings

NVIDIA_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
"""Device files of NVIDIA's driver, in containers too; the second is that of Linux on Windows."""

EXIT_NOW = 130
"""Exit status after a second signal, at which a worker exits without a hand-over."""


class WorkerCommand(SettingsCommand):
    @staticmethod
    def make() -> Callable[..., None]:
        from ingine.cli.settings_flags import with_flags
        from ingine.worker.settings import WorkerSettings

        return with_flags(worker, WorkerSettings)


def register(app: typer.Typer) -> None:
    WorkerCommand.register(app, worker)


def worker(**flags: object) -> None:
    """Run a worker: take jobs, generate, publish every token.

    Each option is also a variable (--lease-s is INGINE_LEASE_S) or a line in `.env`. Options override
    variables, and variables override `.env`. Sizes in bytes may have a unit (2GB, 2GiB); durations are in
    seconds.

    Exit status: 0 drained, 1 a part of the worker broke, 2 wrong setting, model or device, 130 second signal.
    """
    from ingine.worker.settings import load_settings

    run_worker(load_settings(**flags))


def run_worker(settings: "WorkerSettings") -> None:
    """Run a worker until a signal ends it. Loads the model first: a bad one fails before Redis is used."""
    with frozen_imports():
        import asyncio

        from ingine.connect.environment import check_variables
        from ingine.worker.http_port import with_usable_port
        from ingine.worker.logs import log_event, setup_logging
        from ingine.worker.server_choice import ensure_server
        from ingine.worker.worker import Worker  # noqa: F401

    setup_logging(settings.log_level, as_json=settings.log_json)
    for name in check_variables():
        log_event(logging.getLogger("worker"), logging.WARNING, "unknown variable", variable=name)
    if settings.tensor_parallel_size > 1 and os.environ.get("RANK", "0") != "0":
        follow(settings)
        return
    settings = with_usable_port(settings)
    engine, model = build_engine(settings)
    _, server = ensure_server(settings.redis_url)
    gc.collect()
    gc.freeze()  # what is loaded now stays, so collections can skip it
    try:
        # Another process's embedded server may move, so without one of its own each connection looks it up.
        asyncio.run(_serve(settings, server.url if server else settings.redis_url, engine, model))
    finally:
        engine.close()
        if server:
            server.stop()


def follow(settings: "WorkerSettings") -> None:
    """Run a rank other than 0 of a tensor parallel engine: it computes its part of rank 0's steps.

    Signals reach all ranks, but only rank 0 handles them, since it needs the others for its last step. This
    rank ends when rank 0 says so, or has died.
    """
    from ingine.engine.engine import Engine
    from ingine.worker.logs import log_event

    engine = Engine(engine_config(settings))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    try:
        engine.follow()
    except Exception as error:
        rank = os.environ["RANK"]
        log_event(logging.getLogger("worker"), logging.ERROR, "rank failed", rank=rank, error=repr(error))
        # A normal exit may wait for a collective on the GPU, which waits for a rank that has died.
        os._exit(1)
    engine.close()
    if _may_be_gpu(settings.device):
        os._exit(0)  # NCCL's destructors may wait for graphs captured with it


def build_engine(settings: "WorkerSettings") -> "tuple[EngineHost, ServedModel]":
    """Start the engine, and describe the model that it serves.

    A GPU computes while Python runs, so whatever holds the interpreter delays the next step; the engine
    therefore gets a process of its own. On a CPU, engine and worker compete for cores, not for the
    interpreter, and the engine runs in a thread.
    """
    config = engine_config(settings)
    if _may_be_gpu(settings.device):
        from ingine.worker.hosting.engine_child import command
        from ingine.worker.hosting.engine_process import EngineProcess

        program = command(config, log_level=settings.log_level, log_json=settings.log_json)
        engine = EngineProcess(program, lambda: _load_tokenizer(config.model))
        return engine, _served_model(settings, config.model, engine.numerics)
    with frozen_imports():
        from ingine.engine.engine import Engine
        from ingine.worker.hosting.engine_thread import EngineThread
    engine = EngineThread(lambda: Engine(config))
    return engine, _served_model(settings, config.model, engine.numerics)


def _served_model(settings: "WorkerSettings", model: str, numerics: str) -> "ServedModel":
    from ingine.engine.store.fingerprint import model_fingerprint
    from ingine.engine.store.model_store import names_of, resolve_model
    from ingine.worker.message_formats import format_names
    from ingine.worker.served_model import ServedModel

    decides = ",".join([numerics, *format_names(settings)])
    return ServedModel(names_of(model), model_fingerprint(resolve_model(model)), decides)


def _may_be_gpu(device: str) -> bool:
    """Guess whether the device is a GPU, without loading torch, which takes seconds and which the engine's
    process loads itself.

    A wrong guess does no harm: the engine selects its device itself, in a thread or a process.
    """
    if device != "auto":
        return device.startswith("cuda")
    return any(Path(path).exists() for path in NVIDIA_DEVICES)


def _load_tokenizer(model: str) -> "Tokenizer | None":
    from ingine.engine.store.model_store import resolve_model
    from ingine.engine.text.tokenizer import load_tokenizer

    return load_tokenizer(resolve_model(model))


def engine_config(settings: "WorkerSettings") -> "EngineConfig":
    from ingine.engine.config import EngineConfig
    from ingine.engine.store.model_store import DEFAULT_MODEL

    return EngineConfig(**settings.engine_options() | {"model": settings.model or DEFAULT_MODEL})


async def _serve(
    settings: "WorkerSettings", url: str | None, engine: "EngineHost", model: "ServedModel"
) -> None:
    import asyncio

    from ingine.worker.worker import Worker

    worker = Worker(settings, url, engine, model=model)
    loop = asyncio.get_running_loop()
    signals = itertools.count(1)

    def on_signal() -> None:
        if next(signals) > 1:
            # No hand-over: the leases expire.
            logging.getLogger("worker").warning("second signal: leaving now")
            os._exit(EXIT_NOW)
        worker.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    worker.prompts.start()
    await worker.run()
