"""The program of an engine's own process: `python -m ingine.worker.hosting.engine_child '{"model": ...}'`.

Its standard input is a socket to the worker that started it: see `hosting.pipe`. It ends when told to,
and with that worker, at once and whatever a step is doing: nobody is left who could take its tokens.
"""

import gc
import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ingine.engine.config import EngineConfig
from ingine.errors import ErrorCode, IngineError, InvalidRequest
from ingine.worker.child import die_with_parent
from ingine.worker.frozen_imports import frozen_imports
from ingine.worker.hosting.engine_link import EngineFailure, StepMessage
from ingine.worker.hosting.pipe import (
    Message,
    make_unpacker,
    pack,
    pack_error,
    pack_outputs,
    pack_stats,
    unpack_request,
)
from ingine.worker.logs import setup_logging

if TYPE_CHECKING:
    from ingine.engine.engine import Engine
    from ingine.worker.hosting.engine_thread import EngineThread

PULSE_S = 1.0
EXIT_ORPHANED = 1
"""Nobody reads it but whoever looks after orphans."""


def command(config: EngineConfig, *, log_level: str, log_json: bool) -> list[str]:
    """How to start it."""
    given = {"config": asdict(config), "log_level": log_level, "log_json": log_json}
    # -P: a folder `worker` where we were started is not this package.
    return [sys.executable, "-P", "-m", "ingine.worker.hosting.engine_child", json.dumps(given)]


def serve_engine(build: Callable[[], "Engine"]) -> None:
    """The whole life of an engine's process. What `build` raises is told to the worker."""
    # A service manager's SIGTERM may be for all processes. The worker hands over, and then says `stop`.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()  # even in a step that keeps the interpreter, so that the end of file is never read
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _Server(connection).run(build)


class _Server:
    """Hosts an EngineThread for whoever is at the other end of `connection`.

    Without an event loop: the engine's thread sends for itself, and there is little to read, so that the
    threads here seldom want the interpreter at the same time.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._sending = threading.Lock()
        self._computes = False
        self._ended = threading.Event()

    def run(self, build: Callable[[], "Engine"]) -> None:
        reader = threading.Thread(target=self._read, name="reader", daemon=True)
        reader.start()
        try:
            self._thread = _build_thread(build)
        except Exception as error:
            self._send("not built", pack_error(error))
            if isinstance(error, IngineError):
                return
            raise  # its traceback is for the log
        gc.collect()
        gc.freeze()  # what is loaded stays: no collection need look through it again
        limits = asdict(self._thread.limits)
        self._send("built", self._thread.max_num_seqs, self._thread.numerics, limits, self._stats)
        while not self._ended.wait(PULSE_S):
            if self._computes:
                self._send("pulse", self._thread.step_age_s, self._stats)
        self._send("stopped")
        reader.join()  # until the worker has read all of it and closed its end
        self._thread.close()

    def _read(self) -> None:
        try:
            unpacker = make_unpacker()
            while received := self._connection.recv(1 << 16):
                unpacker.feed(received)
                for message in unpacker:
                    self._obey(message)
        except ConnectionError:
            pass  # the worker is gone, as it is at the end of file
        except Exception:
            traceback.print_exc()
        if not self._ended.is_set():
            os._exit(EXIT_ORPHANED)  # not by returning, which would wait for the step under way

    def _obey(self, message: Message) -> None:
        match message:
            case ["credit"]:
                self._thread.credit()
            case ["add", request]:
                self._add(request)
            case ["abort", seq_id]:
                self._thread.abort(seq_id)
            case ["start"]:
                self._computes = True
                self._thread.run(self._deliver, self._ended.set)
            case ["stop"]:
                self._thread.request_stop()

    def _add(self, packed: dict[str, Any]) -> None:
        """A fault is this sequence's alone, as those that `Engine.add` raises are."""
        try:
            request = unpack_request(packed)
        except Exception as error:
            self._thread.refuse(packed["seq_id"], InvalidRequest(ErrorCode.INVALID_PARAMETER, str(error)))
        else:
            self._thread.add(request)

    def _deliver(self, message: StepMessage) -> None:
        if isinstance(message, EngineFailure):
            error = pack_error(message.error)
            self._send("failure", message.seq_ids, error, message.fatal, self._stats)
        else:
            self._send("outputs", pack_outputs(message), self._stats)

    @property
    def _stats(self) -> dict[str, int | float]:
        return pack_stats(self._thread.stats)

    def _send(self, *message: object) -> None:
        packed = pack(*message)
        try:
            with self._sending:
                self._connection.sendall(packed)
        except OSError:
            os._exit(EXIT_ORPHANED)


def _build_thread(build: Callable[[], "Engine"]) -> "EngineThread":
    with frozen_imports():  # torch among them: what may be wrong with that is to be told as well
        from ingine.worker.hosting.engine_thread import EngineThread

    return EngineThread(build)


def main() -> None:
    given = json.loads(sys.argv[1])
    setup_logging(given["log_level"], as_json=given["log_json"])

    def build() -> "Engine":
        from ingine.engine.engine import Engine

        return Engine(EngineConfig(**given["config"]))

    serve_engine(build)
    if given["config"]["tensor_parallel_size"] > 1:
        os._exit(0)  # NCCL's destructors may wait for graphs that were captured with it


if __name__ == "__main__":
    main()
