"""The program of an engine's own process: `python -m ingine.worker.hosting.engine_child '{"model": ...}'`.

Its standard input is a socket to the worker that started it: see `hosting.pipe`. It ends on the message
`stop`, and at once when that worker ends, even in the middle of a step: its tokens are of no use then.
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
"""Exit status when the worker has ended."""


def command(config: EngineConfig, *, log_level: str, log_json: bool) -> list[str]:
    """The command that starts this program."""
    given = {"config": asdict(config), "log_level": log_level, "log_json": log_json}
    # -P: a folder `worker` in the current folder must not shadow this package.
    return [sys.executable, "-P", "-m", "ingine.worker.hosting.engine_child", json.dumps(given)]


def serve_engine(build: Callable[[], "Engine"]) -> None:
    """Build and run an engine until the worker stops it. An exception of `build` is sent to the worker."""
    # A service manager may send SIGTERM to all processes. The worker hands over, and then sends `stop`.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()  # also in a step that holds the interpreter, so that the end of file is not read
    connection = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _Server(connection).run(build)


class _Server:
    """Hosts an EngineThread for the worker at the other end of `connection`.

    It has no event loop: the engine's thread sends its outputs itself, and there is little to read, so the
    threads of this process seldom compete for the interpreter.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._sending = threading.Lock()
        self._is_running = False
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
        gc.freeze()  # the model stays loaded: exclude its objects from all later collections
        thread = self._thread
        limits = asdict(thread.limits)
        self._send("built", thread.max_num_seqs, thread.numerics, thread.model_type, limits, self._stats)
        while not self._ended.wait(PULSE_S):
            if self._is_running:
                self._send("pulse", self._thread.step_age_s, self._stats)
        self._send("stopped")
        reader.join()  # returns once the worker has read all of it and closed its end
        self._thread.close()

    def _read(self) -> None:
        try:
            unpacker = make_unpacker()
            while received := self._connection.recv(1 << 16):
                unpacker.feed(received)
                for message in unpacker:
                    self._obey(message)
        except ConnectionError:
            pass  # the worker has ended, as at the end of file
        except Exception:
            traceback.print_exc()
        if not self._ended.is_set():
            os._exit(EXIT_ORPHANED)  # returning would wait for the current step

    def _obey(self, message: Message) -> None:
        match message:
            case ["credit"]:
                self._thread.credit()
            case ["add", request]:
                self._add(request)
            case ["abort", seq_id]:
                self._thread.abort(seq_id)
            case ["start"]:
                self._is_running = True
                self._thread.run(self._deliver, self._ended.set)
            case ["stop"]:
                self._thread.request_stop()

    def _add(self, packed: dict[str, Any]) -> None:
        """Add a request. A fault in it concerns this sequence alone, like an exception of `Engine.add`."""
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
    with frozen_imports():  # this imports torch: an error of that is sent to the worker too
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
