"""A process of its own for prompts whose cost nobody knows before they are read.

Chat templates and tokenizers are programs that come with a model, run on what anybody sends. They can loop,
fill memory, or keep the interpreter for seconds, and nothing ends them but the end of their process.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
from collections import deque
from dataclasses import dataclass
from typing import Any

from ingine.engine.text.tokenizer import Definition
from ingine.errors import EngineError, ErrorCode, InvalidRequest
from ingine.worker.hosting.pipe import Message, Pipe, pack
from ingine.worker.hosting.prompt_child import EXIT_OUT_OF_MEMORY, MEMORY_BYTES, command
from ingine.worker.logs import log_event

logger = logging.getLogger(__name__)

SILENCE_S = 60.0
"""For a process that uses no processor time either (somebody has stopped it): the kernel ends the others."""
CLOCK_PER_CPU_S = 8.0
"""Time by the clock for a second of a process, on a machine that has other work."""

MAX_FAILED_STARTS = 3
"""In a row, before those who wait are told."""
RESTART_DELAY_S = 1.0
RETRY_S = 5.0
"""Once they have been told."""


class NoPromptProcess(EngineError):
    """None can be started, for want of memory or of processes: no prompt's fault, and only this worker's."""


@dataclass(eq=False)
class _Request:
    tenant: str
    cpu_s: float
    message: bytes
    answer: asyncio.Future[list[int] | int]
    tried_twice: bool = False


class PromptProcess:
    """Reads prompts one by one, in turns by tenant, in a process that is started for the first.

    When the process ends, the prompt that it said it had begun is to blame and is refused. Another one reads
    the rest. None outlives this process.
    """

    def __init__(self, definition: Definition, max_num_tokens: int, *, max_in_flight: int):
        """max_in_flight: prompts that lie with the process at a time, whose order is settled."""
        self._first_message = pack(*definition, max_num_tokens)
        self._max_in_flight = max_in_flight
        self._waiting: dict[str, deque[_Request]] = {}
        """By tenant; whose turn it is comes first."""
        self._in_flight: deque[_Request] = deque()
        """The first of them is read next, or is being read."""
        self._reading: _Request | None = None
        """Which the process has begun: nothing else can have ended it."""
        self._wanted = asyncio.Event()
        self._life: asyncio.Task | None = None
        self._pipe: Pipe | None = None
        self._is_ready = False
        self._has_begun = False
        """This process has begun at least one prompt."""
        self._silence: asyncio.TimerHandle | None = None
        self.popen: subprocess.Popen | None = None
        self.start_error: str | None = None
        """Why `MAX_FAILED_STARTS` or more have failed. Until one starts nobody is kept waiting."""

    async def read(self, tenant: str, cpu_s: float, *prompt: Any) -> list[int] | int:
        """Token ids of a text, or of messages and the time (seconds since the epoch) when they were sent.
        Only their number if there are too many.

        Raises InvalidRequest, PROMPT_TOO_COSTLY after `cpu_s` of processor time among them, or
        NoPromptProcess.
        """
        if self.start_error:
            raise NoPromptProcess(self.start_error)
        answer = asyncio.get_running_loop().create_future()
        request = _Request(tenant, cpu_s, pack(cpu_s, *prompt), answer)
        self._waiting.setdefault(tenant, deque()).append(request)
        self.start()
        self._send()
        return await answer

    def start(self) -> None:
        """So that the first prompt need not wait for it."""
        self._wanted.set()
        if self._life is None or self._life.done():
            self._life = asyncio.create_task(self._live(), name="prompts")

    async def close(self) -> None:
        """What is not read by now is never answered."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])

    # ---------------------------------------------------------------------------------- requests

    def _send(self) -> None:
        """As much of what waits as may lie with the process."""
        while self._is_ready and len(self._in_flight) < self._max_in_flight and (request := self._next()):
            self._in_flight.append(request)
            self._pipe.write(request.message)
            if len(self._in_flight) == 1:
                self._watch()

    def _next(self) -> _Request | None:
        while self._waiting:
            tenant, requests = next(iter(self._waiting.items()))
            request = requests.popleft()
            del self._waiting[tenant]
            if requests:
                self._waiting[tenant] = requests  # behind all others
            if not request.answer.done():  # else whoever asked has given up
                return request
        return None

    def _put_back(self, request: _Request) -> None:
        """It is the next one again."""
        requests = self._waiting.pop(request.tenant, deque())
        requests.appendleft(request)
        self._waiting = {request.tenant: requests, **self._waiting}

    def _receive(self, message: Message) -> None:
        match message:
            case ["ready"]:
                self._is_ready = True
                self.start_error = None
            case ["begun"]:
                self._has_begun = True
                self._reading = self._in_flight[0]
            case ["read" | "too long", answer]:
                self._answer_first(answer)
            case ["refused", code, text]:
                self._answer_first(InvalidRequest(ErrorCode(code), text))
        self._watch()
        self._send()

    def _answer_first(self, answer: list[int] | int | InvalidRequest) -> None:
        self._reading = None
        _answer(self._in_flight.popleft(), answer)

    def _watch(self) -> None:
        if self._silence:
            self._silence.cancel()
        self._silence = None
        if self._in_flight or not self._is_ready:
            # Its own limit of processor time comes first, however busy the machine is.
            computing_s = CLOCK_PER_CPU_S * self._in_flight[0].cpu_s if self._in_flight else 0.0
            wait = asyncio.get_running_loop().call_later
            self._silence = wait(SILENCE_S + computing_s, self._kill)

    def _kill(self) -> None:
        if self._reading:
            self._reading.tried_twice = True  # a minute is enough
        self.popen.kill()

    # ------------------------------------------------------------------------------- the process

    async def _live(self) -> None:
        """One process after another, each when there is something to read, or when none could be started."""
        num_failed = 0
        while True:
            await self._wanted.wait()
            if fault := await self._try_one():
                num_failed += 1
                await self._recover_start(num_failed, fault)
            else:
                num_failed = 0
            if not self._waiting and not self.start_error:
                self._wanted.clear()

    async def _try_one(self) -> str | None:
        """Run a process, and settle what it leaves. Why it was of no use, or None if it was."""
        self._has_begun = False
        try:
            status = await self._run_one()
        except Exception as error:  # no memory, no more processes or threads
            status, fault = None, repr(error)
        else:
            has_served = self._is_ready and (self._has_begun or not self._in_flight)
            fault = None if has_served else f"status {status}"
        self._is_ready = False
        begun, self._reading = self._reading, None
        to_blame = begun if status is not None else None
        while self._in_flight:
            if (request := self._in_flight.pop()) is not to_blame:
                self._put_back(request)
        if to_blame:
            self._settle(to_blame, status)
        return fault

    async def _run_one(self) -> int:
        """From its start to its end. Its exit status: negative for a signal."""
        ours = self._spawn()
        lost = asyncio.Event()
        try:
            with ours.dup() as unread:
                self._pipe = await Pipe.open(ours, self._receive, lost.set)
                self._pipe.write(self._first_message)
                self._watch()
                await lost.wait()
                self._receive_rest(unread)
        finally:
            if self._silence:
                self._silence.cancel()
            self.popen.kill()
            if self._pipe:
                self._pipe.close()
            await asyncio.to_thread(self.popen.wait)
        return self.popen.returncode

    def _receive_rest(self, unread: socket.socket) -> None:
        """What the event loop has not read when it found that it cannot write: it may say what was begun."""
        unread.setblocking(False)
        with contextlib.suppress(OSError):  # that is the end of it too
            while received := unread.recv(1 << 16):
                self._pipe.data_received(received)

    def _spawn(self) -> socket.socket:
        """Start a process. Our end of what is its standard input."""
        ours, theirs = socket.socketpair()
        with theirs:
            env = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
            try:
                self.popen = subprocess.Popen(command(), stdin=theirs, env=env, start_new_session=True)
            except OSError:
                ours.close()
                raise
        return ours

    def _settle(self, request: _Request, status: int) -> None:
        """A process has ended while it read this one."""
        log_event(logger, logging.WARNING, "prompt process ended", status=status, tenant=request.tenant)
        # Nothing that it reads ends it so: somebody else did, or memory was short.
        if status == -signal.SIGKILL and not request.tried_twice:
            request.tried_twice = True
            self._put_back(request)
        else:
            reason = _reason(status, request.cpu_s)
            _answer(request, InvalidRequest(ErrorCode.PROMPT_TOO_COSTLY, reason))

    async def _recover_start(self, num_failed: int, said: str) -> None:
        log_event(logger, logging.WARNING, "prompt process not started", error=said)
        if num_failed < MAX_FAILED_STARTS:
            await asyncio.sleep(RESTART_DELAY_S)
            return
        self.start_error = said
        while request := self._next():
            _answer(request, NoPromptProcess(said))
        await asyncio.sleep(RETRY_S)


def _answer(request: _Request, answer: list[int] | int | Exception) -> None:
    if request.answer.done():
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
    else:
        request.answer.set_result(answer)


def _reason(status: int, cpu_s: float) -> str:
    if status == -signal.SIGPROF:
        return f"reading the prompt took more than {cpu_s:.1f} s of processor time"
    if status in (EXIT_OUT_OF_MEMORY, -signal.SIGABRT):  # Python's way to run out of memory, and Rust's
        return f"reading the prompt took more than {MEMORY_BYTES >> 20} MiB of memory"
    return f"reading the prompt ended the process that did so, with status {status}"
