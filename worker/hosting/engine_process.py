"""Host an engine in its own process, so that engine and worker do not compete for one interpreter."""

import asyncio
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ingine.engine.limits import RequestLimits
from ingine.engine.outputs import EngineStats
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import EngineError
from ingine.worker.hosting.engine_link import EngineFailure, StepMessage
from ingine.worker.hosting.pipe import (
    Message,
    Pipe,
    make_unpacker,
    pack_request,
    unpack_error,
    unpack_outputs,
    unpack_stats,
)

SILENCE_S = 5.0
"""Silence, without even a `pulse`, after which a step is taken to hold the process's interpreter."""

END_TIMEOUT_S = 5.0
"""How long a closed process may take to end before it gets SIGKILL."""


class EngineProcess:
    """An `EngineHost` whose engine is built and run by a program that calls `engine_child.serve_engine`.

    The program runs in its own session, which the terminal's Ctrl-C does not reach, and ends with this
    process, however this one ends. If it ends by itself, a fatal EngineFailure of all its sequences is
    delivered.
    """

    def __init__(self, command: Sequence[str], load_tokenizer: Callable[[], Tokenizer | None]):
        """Start the program, and return when the engine is built. `load_tokenizer` is called then, once the
        program has downloaded the model's files.

        Raises the exception that building the engine raised, see `pipe.unpack_error`, and EngineError if the
        program ended.
        """
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(command, stdin=theirs, start_new_session=True)
        self._held: dict[str, None] = {}
        """The ids of the sequences that the process has, in the order in which they were added."""
        self._pipe: Pipe | None = None
        self._broken = False
        self._step_age_s = 0.0
        try:
            self.max_num_seqs, self.numerics, self.model_type, limits, stats = self._wait_until_built()
            self.limits = RequestLimits(**limits)
            self.stats: EngineStats = unpack_stats(stats)
            self.tokenizer = load_tokenizer()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._popen.pid

    async def start(self, deliver: Callable[[StepMessage], None]) -> None:
        self._deliver = deliver
        self._ended = asyncio.Event()
        self._heard = time.monotonic()
        self._pipe = await Pipe.open(self._connection, self._receive, self._lost)
        self._pipe.send("start")

    @property
    def alive(self) -> bool:
        return not self._broken and self._popen.poll() is None

    @property
    def step_age_s(self) -> float:
        silent_s = time.monotonic() - self._heard
        return silent_s if silent_s > SILENCE_S else self._step_age_s

    @property
    def suspects(self) -> list[str]:
        """All sequences that the process has: a process that hangs cannot say which are in its batch."""
        return list(self._held)

    def add(self, request: EngineRequest) -> None:
        self._held[request.seq_id] = None
        self._pipe.send("add", pack_request(request))

    def abort(self, seq_id: str) -> None:
        self._pipe.send("abort", seq_id)

    def credit(self) -> None:
        self._pipe.send("credit")

    async def stop(self) -> None:
        self._pipe.send("stop")
        await self._ended.wait()

    def close(self) -> None:
        with suppress(OSError):  # it is closed already
            self._connection.shutdown(socket.SHUT_RDWR)
        if self._pipe is None:
            self._connection.close()
        try:
            self._popen.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _wait_until_built(self) -> tuple[int, str, str, dict, dict]:
        unpacker = make_unpacker()
        while received := self._connection.recv(1 << 16):
            unpacker.feed(received)
            for name, *brought in unpacker:
                if name == "not built":
                    raise unpack_error(*brought)
                return brought
        self._popen.wait()
        raise EngineError(f"the engine's process {self._ending} while it built the engine")

    def _receive(self, message: Message) -> None:
        self._heard = time.monotonic()
        self._step_age_s = 0.0
        match message:
            case ["outputs", columns, stats]:
                self.stats = unpack_stats(stats)
                outputs = unpack_outputs(columns)
                for output in outputs:
                    if output.ends_request:
                        self._held.pop(output.seq_id, None)
                self._deliver(outputs)
            case ["failure", seq_ids, error, fatal, stats]:
                self.stats = unpack_stats(stats)
                self._fail(EngineFailure(seq_ids, unpack_error(error), fatal))
            case ["pulse", step_age_s, stats]:
                self.stats = unpack_stats(stats)
                self._step_age_s = step_age_s
            case ["stopped"]:
                self._ended.set()
                self._pipe.close()

    def _fail(self, failure: EngineFailure) -> None:
        self._broken = self._broken or failure.fatal
        for seq_id in failure.seq_ids:
            self._held.pop(seq_id, None)
        self._deliver(failure)

    def _lost(self) -> None:
        if not self._ended.is_set():
            self._broken = True
            self._reporting = asyncio.create_task(self._report_end())

    async def _report_end(self) -> None:
        """Deliver the failure of a process that ended without the message `stopped`."""
        await asyncio.to_thread(self.close)
        error = EngineError(f"the engine's process {self._ending}")
        self._fail(EngineFailure(list(self._held), error, fatal=True))
        self._ended.set()

    @property
    def _ending(self) -> str:
        status = self._popen.returncode
        if status >= 0:
            return f"ended with status {status}"
        return f"was killed by {signal.Signals(-status).name}"
