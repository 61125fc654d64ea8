"""Read prompts in a separate process, for prompts whose cost is unknown before they are read.

Chat templates and tokenizers are programs that come with a model, and run on any client's input. They may
loop, fill memory, or hold the interpreter for seconds, and only the end of their process ends them.
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

from ingine.engine.limits import RequestLimits
from ingine.engine.text.tokenizer import Definition
from ingine.errors import EngineError, ErrorCode, InvalidRequest
from ingine.worker.hosting.pipe import Message, Pipe, pack
from ingine.worker.hosting.prompt_child import EXIT_OUT_OF_MEMORY, MEMORY_BYTES, Kind, command
from ingine.worker.logs import log_event

logger = logging.getLogger(__name__)

SILENCE_S = 60.0
"""Silence after which a process that uses no processor time (it was stopped, say) is killed. The kernel ends
one that uses too much."""
CLOCK_PER_CPU_S = 8.0
"""Seconds that may pass for a second of processor time, on a machine with other work."""

MAX_FAILED_STARTS = 3
"""Failed starts in a row after which the waiting requests fail with NoPromptProcess."""
RESTART_DELAY_S = 1.0
"""Delay between starts before that."""
RETRY_S = 5.0
"""Delay between starts after that."""


class NoPromptProcess(EngineError):
    """No process can be started, for lack of memory or of processes. No prompt is to blame, and another
    worker may read it."""


@dataclass(eq=False)
class _Request:
    tenant: str
    cpu_s: float
    message: bytes
    answer: asyncio.Future[list[int] | int]
    kind: Kind
    is_last_try: bool = False
    """The request is refused if a process is killed again while it reads it."""


class PromptProcess:
    """Reads prompts one by one, in turns by tenant, in a process that is started for the first one.

    If the process ends, the prompt that it has reported as begun is to blame and is refused. Another process
    reads the others. No such process outlives this one.
    """

    def __init__(self, definition: Definition, limits: RequestLimits, *, max_in_flight: int):
        """max_in_flight: prompts that are sent to the process at a time. Their order is fixed."""
        self._first_message = pack(
            *definition, limits.max_num_tokens, limits.vocab_size, limits.eos_token_ids
        )
        self._max_in_flight = max_in_flight
        self._waiting: dict[str, deque[_Request]] = {}
        """Waiting requests by tenant. The tenant whose turn it is comes first."""
        self._in_flight: deque[_Request] = deque()
        """Requests sent to the process. The first one is read next, or is being read."""
        self._reading: _Request | None = None
        """The request that the process has begun: if the process ends, this is the cause."""
        self._wanted = asyncio.Event()
        self._running: asyncio.Task | None = None
        self._pipe: Pipe | None = None
        self._is_ready = False
        self._has_begun = False
        """The current process has begun at least one prompt."""
        self._silence: asyncio.TimerHandle | None = None
        self.popen: subprocess.Popen | None = None
        self.start_error: str | None = None
        """Why the last `MAX_FAILED_STARTS` or more starts failed. Until one succeeds, `read` raises."""

    async def read(
        self,
        tenant: str,
        cpu_s: float,
        *prompt: Any,
        kind: Kind = Kind.PROMPT,
        num_kept: int | None = None,
    ) -> list[int] | list[list[int]] | int:
        """Return what `kind` asks for. PROMPT: token ids of a text, or of a conversation and the time of its
        submission in seconds since the epoch; only their number if there are too many. BAD_WORDS: those of
        each word, see `encode_bad_words`. GRAMMAR: [] if it compiles, a map as in `structured_outputs`;
        behind it those of the functions of a `ToolConstraint`, if it is one.

        num_kept: only so many of a prompt's last tokens are wanted.

        Raises InvalidRequest, with PROMPT_TOO_COSTLY after `cpu_s` of processor time, or NoPromptProcess.
        """
        if self.start_error:
            raise NoPromptProcess(self.start_error)
        answer = asyncio.get_running_loop().create_future()
        request = _Request(tenant, cpu_s, pack(cpu_s, kind, num_kept, *prompt), answer, kind)
        self._waiting.setdefault(tenant, deque()).append(request)
        self.start()
        self._send()
        return await answer

    def start(self) -> None:
        """Start the process, so that the first prompt need not wait for that."""
        self._wanted.set()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run(), name="prompts")

    async def close(self) -> None:
        """End the process. A prompt that is not read by now is never answered."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    # ---------------------------------------------------------------------------------- requests

    def _send(self) -> None:
        """Send waiting requests, up to `max_in_flight` in total."""
        while self._is_ready and len(self._in_flight) < self._max_in_flight and (request := self._next()):
            self._in_flight.append(request)
            self._pipe.write(request.message)
            if len(self._in_flight) == 1:
                self._watch()

    def _next(self) -> _Request | None:
        """Remove and return the next request, in turns by tenant; None if none waits."""
        while self._waiting:
            tenant, requests = next(iter(self._waiting.items()))
            request = requests.popleft()
            del self._waiting[tenant]
            if requests:
                self._waiting[tenant] = requests  # after all other tenants
            if not request.answer.done():  # else the caller was cancelled
                return request
        return None

    def _put_back(self, request: _Request) -> None:
        """Make this request the next one."""
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
        """Restart the timer that kills a silent process."""
        if self._silence:
            self._silence.cancel()
        self._silence = None
        if self._in_flight or not self._is_ready:
            # Long enough for the limit of processor time to come first, even on a busy machine.
            computing_s = CLOCK_PER_CPU_S * self._in_flight[0].cpu_s if self._in_flight else 0.0
            wait = asyncio.get_running_loop().call_later
            self._silence = wait(SILENCE_S + computing_s, self._kill)

    def _kill(self) -> None:
        if self._reading:
            self._reading.is_last_try = True  # it was silent for a minute: no second try
        self.popen.kill()

    # ------------------------------------------------------------------------------- the process

    async def _run(self) -> None:
        """Run one process after another, each when there is a prompt to read, or after a failed start."""
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
        """Run a process until it ends, and deal with the requests that it leaves. Returns why it has served
        nothing, or None if it has."""
        self._has_begun = False
        try:
            status = await self._run_one()
        except Exception as error:  # out of memory, processes or threads
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
        """Start a process and wait for its end. Returns its exit status, negative for a signal."""
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
        """Receive what the event loop had not read when a write failed: it may say which prompt was begun."""
        unread.setblocking(False)
        with contextlib.suppress(OSError):  # nothing more to read
            while received := unread.recv(1 << 16):
                self._pipe.data_received(received)

    def _spawn(self) -> socket.socket:
        """Start a process. Returns our end of the socket that is its standard input."""
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
        """Retry or refuse a request whose reading has ended a process."""
        log_event(logger, logging.WARNING, "prompt process ended", status=status, tenant=request.tenant)
        # No prompt causes SIGKILL: another program sent it, or the machine was short of memory.
        if status == -signal.SIGKILL and not request.is_last_try:
            request.is_last_try = True
            self._put_back(request)
        else:
            is_grammar = request.kind is Kind.GRAMMAR
            code = ErrorCode.GRAMMAR_TOO_COSTLY if is_grammar else ErrorCode.PROMPT_TOO_COSTLY
            work = "compiling the grammar" if is_grammar else "reading the prompt"
            _answer(request, InvalidRequest(code, _reason(status, request.cpu_s, work)))

    async def _recover_start(self, num_failed: int, fault: str) -> None:
        """Wait before the next start. After `MAX_FAILED_STARTS` failed ones, fail all waiting requests."""
        log_event(logger, logging.WARNING, "prompt process not started", error=fault)
        if num_failed < MAX_FAILED_STARTS:
            await asyncio.sleep(RESTART_DELAY_S)
            return
        self.start_error = fault
        while request := self._next():
            _answer(request, NoPromptProcess(fault))
        await asyncio.sleep(RETRY_S)


def _answer(request: _Request, answer: list[int] | int | Exception) -> None:
    if request.answer.done():
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
    else:
        request.answer.set_result(answer)


def _reason(status: int, cpu_s: float, work: str) -> str:
    """Why a process ended with `status` during `work`."""
    if status == -signal.SIGPROF:
        return f"{work} took more than {cpu_s:.1f} s of processor time"
    if status in (EXIT_OUT_OF_MEMORY, -signal.SIGABRT):  # out of memory in Python, and in Rust
        return f"{work} took more than {MEMORY_BYTES >> 20} MiB of memory"
    return f"{work} ended its process with status {status}"
