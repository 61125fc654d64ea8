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


def build_engine(settings: WorkerSettings):
    """The engine in its thread, and the names under which jobs may ask for its model."""
    from ingine.config import EngineConfig
    from ingine.engine import Engine
    from ingine.model_store import DEFAULT_MODEL, names_of
    from worker.engine_thread import EngineThread

    model = settings.model or DEFAULT_MODEL
    config = EngineConfig(**settings.engine_options() | {"model": model})
    return EngineThread(lambda: Engine(config)), names_of(model)


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
