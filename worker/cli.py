"""`ingine worker`. Its flags are the settings' own: `worker.settings`."""

import asyncio
import gc
import itertools
import logging
import os
import signal

import typer

from worker.settings import WorkerSettings, load_settings

EXIT_NOW = 130
"""Of a worker that was told twice to stop, and left without a hand-over."""


def register(app: typer.Typer) -> None:
    app.command(
        "worker",
        help="Run a worker: take jobs from the queue, generate, publish every token.",
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(worker)


def worker(context: typer.Context) -> None:
    run_worker(load_settings(context.args))


def run_worker(settings: WorkerSettings) -> None:
    """Blocks until a signal ends it. Loads the model first: a wrong one fails before Redis is touched."""
    _import_worker()
    from worker.embedded import ensure_server
    from worker.logs import setup_logging

    setup_logging(settings.log_level, as_json=settings.log_json)
    if settings.tensor_parallel_size > 1 and os.environ.get("RANK", "0") != "0":
        follow(settings)
        return
    engine, served_names = build_engine(settings)
    url, server = ensure_server(settings.redis_url)
    gc.collect()
    gc.freeze()  # what is loaded stays: no collection need look through it again
    try:
        asyncio.run(_serve(settings, url, engine, served_names))
    finally:
        if server:
            server.stop()


def _import_worker() -> None:
    """All of it, torch above all, without the collections that so many new objects would set off. They stay,
    and no collection need look through them.
    """
    gc.disable()
    try:
        from worker.worker import Worker  # noqa: F401

        gc.freeze()
    finally:
        gc.enable()


def follow(settings: WorkerSettings) -> None:
    """A rank other than 0 of a tensor parallel engine: computes its part of rank 0's steps, knows no Redis.

    Signals reach all ranks, and are rank 0's to answer: it needs the others for its last step. This one ends
    when rank 0 says so, or is gone.
    """
    from ingine.engine import Engine
    from worker.logs import log_event

    engine = Engine(engine_config(settings))
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    try:
        engine.follow()
    except Exception as error:
        rank = os.environ["RANK"]
        log_event(logging.getLogger("worker"), logging.ERROR, "rank failed", rank=rank, error=repr(error))
        # An orderly exit may wait for a collective on the GPU, and that for a rank that is gone.
        os._exit(1)
    engine.close()


def build_engine(settings: WorkerSettings):
    """The engine in its thread, and the names under which jobs may ask for its model."""
    from ingine.engine import Engine
    from ingine.model_store import names_of
    from worker.engine_thread import EngineThread

    config = engine_config(settings)
    return EngineThread(lambda: Engine(config)), names_of(config.model)


def engine_config(settings: WorkerSettings):
    from ingine.config import EngineConfig
    from ingine.model_store import DEFAULT_MODEL

    return EngineConfig(**settings.engine_options() | {"model": settings.model or DEFAULT_MODEL})


async def _serve(settings: WorkerSettings, url: str, engine, served_names: frozenset[str]) -> None:
    from worker.worker import Worker

    worker = Worker(settings, url, engine, served_names=served_names)
    loop = asyncio.get_running_loop()
    signals = itertools.count(1)

    def on_signal() -> None:
        if next(signals) > 1:
            # No hand-over: the leases run out by themselves.
            logging.getLogger("worker").warning("second signal: leaving now")
            os._exit(EXIT_NOW)
        worker.stop()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal)
    await worker.run()
