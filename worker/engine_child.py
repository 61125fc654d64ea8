"""The program of an engine's own process: `python -m worker.engine_child '{"model": ...}'`.

Its standard input is a socket to the worker that started it: see `worker.engine_pipe`. It ends when told to,
and with that worker, at once and whatever a step is doing: nobody is left who could take its tokens.
"""

import asyncio
import ctypes
import gc
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from ingine.config import EngineConfig
from ingine.errors import IngineError
from ingine.sampling_params import SamplingParams
from worker.engine_link import EngineFailure, StepMessage
from worker.engine_pipe import Message, Pipe, pack_error, pack_outputs, pack_stats
from worker.logs import setup_logging

if TYPE_CHECKING:
    from ingine.engine import Engine

PULSE_S = 1.0
PR_SET_PDEATHSIG = 1
EXIT_ORPHANED = 1
"""Nobody reads it but whoever looks after orphans."""


def command(engine_options: dict, *, log_level: str, log_json: bool) -> list[str]:
    """How to start it. `engine_options` are `EngineConfig`'s."""
    given = {"engine": engine_options, "log_level": log_level, "log_json": log_json}
    return [sys.executable, "-m", "worker.engine_child", json.dumps(given)]


def serve_engine(build: Callable[[], "Engine"]) -> None:
    """The whole life of an engine's process. What `build` raises is told to the worker."""
    # A service manager's SIGTERM may be for all processes. The worker hands over, and then says `stop`.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    _die_with_parent()
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    asyncio.run(_Server().run(connection, build))


def _die_with_parent() -> None:
    """Even in a step that keeps the interpreter, so that the end of file is never read. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Server:
    """Hosts an EngineThread for whoever is at the other end of the pipe."""

    def __init__(self) -> None:
        self._stop_requested = asyncio.Event()
        self._left = asyncio.Event()
        self._leaving = False

    async def run(self, connection: socket.socket, build: Callable[[], "Engine"]) -> None:
        from worker.engine_thread import EngineThread  # torch, which may be missing

        self._pipe = await Pipe.open(connection, self._receive, self._lost)
        try:
            self._thread = await asyncio.to_thread(EngineThread, build)
        except Exception as error:
            await self._leave("not built", pack_error(error))
            if isinstance(error, IngineError):
                return
            raise  # its traceback is for the log
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look through it again
        limits = asdict(self._thread.engine.limits)
        self._pipe.send("built", self._thread.max_num_seqs, limits, pack_stats(self._thread.stats))
        await self._stop_requested.wait()
        await self._thread.stop()
        await self._leave("stopped")

    def _receive(self, message: Message) -> None:
        match message:
            case ["add", seq_id, prompt_token_ids, params, priority, arrival_time, output_token_ids]:
                self._thread.add(
                    seq_id,
                    prompt_token_ids,
                    SamplingParams(**params),
                    priority=priority,
                    arrival_time=arrival_time,
                    output_token_ids=output_token_ids,
                )
            case ["abort", seq_id]:
                self._thread.abort(seq_id)
            case ["credit"]:
                self._thread.credit()
            case ["start"]:
                self._running = asyncio.create_task(self._run())
            case ["stop"]:
                self._stop_requested.set()

    async def _run(self) -> None:
        await self._thread.start(self._deliver)
        while True:
            self._pipe.send("pulse", self._thread.step_age_s, pack_stats(self._thread.stats))
            await asyncio.sleep(PULSE_S)

    def _deliver(self, message: StepMessage) -> None:
        stats = pack_stats(self._thread.stats)
        if isinstance(message, EngineFailure):
            self._pipe.send("failure", message.seq_ids, pack_error(message.error), message.fatal, stats)
        else:
            self._pipe.send("outputs", pack_outputs(message), stats)

    async def _leave(self, *last_word: object) -> None:
        self._pipe.send(*last_word)
        self._leaving = True
        self._pipe.close()
        await self._left.wait()

    def _lost(self) -> None:
        if not self._leaving:
            os._exit(EXIT_ORPHANED)  # not a return: that would wait for the step under way
        self._left.set()


def main() -> None:
    given = json.loads(sys.argv[1])
    setup_logging(given["log_level"], as_json=given["log_json"])

    def build() -> "Engine":
        from ingine.engine import Engine

        return Engine(EngineConfig(**given["engine"]))

    serve_engine(build)


if __name__ == "__main__":
    main()
