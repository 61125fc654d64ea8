"""Host an engine in a thread that exchanges messages with the event loop, one per step."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from ingine.engine.engine import Engine, EngineStats
from ingine.engine.limits import RequestLimits
from ingine.engine.outputs import SeqOutput
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import EngineError
from ingine.worker.hosting.engine_link import EngineFailure, StepMessage
from ingine.worker.logs import log_event

logger = logging.getLogger(__name__)

MAX_STEPS_AHEAD = 4
"""Steps that may be delivered and not yet committed, so that steps are computed while others are written to
Redis. Steps that wait for that are written together (`ingine.worker.lanes`)."""

MAX_FAILED_STEPS = 10
"""Steps in a row that may raise, each because of a single sequence, before the engine counts as broken."""

END_TIMEOUT_S = 1.0
"""How long a closed thread may take to end: it also notifies the engine's other ranks, if there are any."""


class EngineThread:
    """An `EngineHost` that builds an engine and runs it in the same thread.

    Each delivered message takes one of `MAX_STEPS_AHEAD` credits, which `credit` gives back. Without a credit
    the engine waits, so a server that is slow or away holds up the engine instead of filling memory.

    The engine is built in the thread that runs it, since OpenMP keeps a team of threads for every thread that
    ever computed: with two teams there are more threads than cores, OpenMP lets them sleep early, and a step
    takes a quarter longer.
    """

    def __init__(self, build: Callable[[], Engine]):
        """Start the thread, and return when the engine is built. Raises what `build` raises."""
        self._commands: deque[tuple[str, Callable[[], list[SeqOutput] | None]]] = deque()
        self._wake = threading.Condition()
        self._credits = threading.Semaphore(MAX_STEPS_AHEAD)
        self._stopping = self._dropping = False
        self._failed_steps = 0
        self.step_began: float | None = None
        """When (`time.monotonic`) the current step began; None between steps."""
        self._started = threading.Event()
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._build_and_run, args=(build, built), name="engine", daemon=True
        )
        self._thread.start()
        self._engine = built.result()
        self.stats: EngineStats = self._engine.stats()

    @property
    def engine(self) -> Engine:
        """The engine. Only its config and its limits are safe to use from other threads."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def model_type(self) -> str:
        return self._engine.model_config.model_type

    @property
    def max_num_seqs(self) -> int:
        return self._engine.config.max_num_seqs

    @property
    def numerics(self) -> str:
        return self._engine.numerics

    @property
    def limits(self) -> RequestLimits:
        return self._engine.limits

    async def start(self, deliver: Callable[[StepMessage], None]) -> None:
        post = asyncio.get_running_loop().call_soon_threadsafe
        self._ended = asyncio.Event()
        self.run(partial(post, deliver), partial(post, self._ended.set))

    def run(self, deliver: Callable[[StepMessage], None], ended: Callable[[], None]) -> None:
        """Begin to run, as `start` does, without a loop: `deliver` is called in the engine's thread, and
        `ended` there after the last message."""
        self._deliver, self._on_end = deliver, ended
        self._started.set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def step_age_s(self) -> float:
        began = self.step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def suspects(self) -> list[str]:
        return self._running_seq_ids()

    def add(self, request: EngineRequest) -> None:
        self._enqueue(request.seq_id, lambda: self._engine.add(request))

    def refuse(self, seq_id: str, error: Exception) -> None:
        """Deliver `error` as if `Engine.add` had raised it for this sequence."""

        def refuse() -> None:
            raise error

        self._enqueue(seq_id, refuse)

    def abort(self, seq_id: str) -> None:
        self._enqueue(seq_id, lambda: self._engine.abort(seq_id))

    def credit(self) -> None:
        self._credits.release()

    def request_stop(self) -> None:
        """Have the thread end after the current step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    async def stop(self) -> None:
        self.request_stop()
        # A join in the loop's executor would hold up the exit of a process whose step hangs.
        await self._ended.wait()

    def close(self) -> None:
        """Have the thread end, and wait up to `END_TIMEOUT_S`. A step that hangs goes on until the process
        ends."""
        self.request_stop()
        self._started.set()
        self._thread.join(END_TIMEOUT_S)

    def _enqueue(self, seq_id: str, command: Callable[[], list[SeqOutput] | None]) -> None:
        with self._wake:
            self._commands.append((seq_id, command))
            self._wake.notify()

    def _build_and_run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            built.set_result(build())
        except BaseException as error:
            built.set_exception(error)
            return
        self._started.wait()
        if not self._stopping:  # it was not stopped before `start`
            self._run()
        self._engine.close()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:  # from code that must not raise: the engine's state is inconsistent
            log_event(logger, logging.ERROR, "engine broken", error=repr(error))
            logger.debug("engine broken", exc_info=error)
            self._post(EngineFailure(self._running_seq_ids(), error, fatal=True))
        finally:
            self._on_end()

    def _step_until_stopped(self) -> None:
        healthy = True
        while healthy and self._wait_for_work():
            self._obey_commands()
            if self._engine.has_unfinished:
                healthy = self._step()
            self.stats = self._engine.stats()
        if healthy and (outputs := self._engine.drain()):
            self._send(outputs)

    def _running_seq_ids(self) -> list[str]:
        """The ids of the running sequences; none if a broken engine cannot list them."""
        try:
            return self._engine.running_seq_ids
        except Exception:
            return []

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._commands or self._engine.has_unfinished):
                self._wake.wait()
            return not self._stopping

    def _obey_commands(self) -> None:
        """Run the commands since the last step. An exception of one concerns only its own sequence."""
        while self._commands:
            seq_id, command = self._commands.popleft()
            try:
                outputs = command()
            except Exception as error:
                self._send(EngineFailure([seq_id], error))
            else:
                if outputs:
                    self._send(outputs)

    def _step(self) -> bool:
        """Run one step. Returns whether the engine can go on."""
        try:
            outputs = self._compute()
        except Exception as error:
            return self._find_culprits(error)
        self._failed_steps = 0
        if outputs:
            self._send(outputs)
        return True

    def _compute(self, *, alone: str | None = None) -> list[SeqOutput]:
        """Compute a step. The watchdog sees only this time, since delivery may wait for the server."""
        self.step_began = time.monotonic()
        try:
            return self._engine.step(alone=alone)
        finally:
            self.step_began = None

    def _find_culprits(self, error: Exception) -> bool:
        """Run the step of each sequence of a failed batch alone, and drop those that fail again. Returns
        whether the engine can go on.

        The engine is broken, and no sequence to blame, after an error of the accelerator or an EngineError
        (a rank has ended): every later step would fail too. It is also broken when all of several sequences
        fail alone, or when batches of one sequence fail `MAX_FAILED_STEPS` times in a row.
        """
        self._failed_steps += 1
        suspects = self._engine.running_seq_ids
        log_event(logger, logging.ERROR, "step failed", sequences=len(suspects), error=repr(error))
        logger.debug("step failed", exc_info=error)
        if isinstance(error, (torch.AcceleratorError, EngineError)):
            return self._give_up(suspects, error)
        culprits = [seq_id for seq_id in suspects if not self._step_alone(seq_id)]
        if len(culprits) < len(suspects):
            self._failed_steps = 0
        elif len(culprits) > 1 or self._failed_steps >= MAX_FAILED_STEPS:
            return self._give_up(culprits, error)
        if culprits:
            self._drop(culprits, error)
        return True

    def _step_alone(self, seq_id: str) -> bool:
        """Run a step of one sequence. Returns False if it raises."""
        if seq_id not in self._engine.running_seq_ids:
            return True  # preempted by the step of a sequence before it
        try:
            outputs = self._compute(alone=seq_id)
        except Exception:
            return False
        if outputs:
            self._send(outputs)
        return True

    def _give_up(self, seq_ids: list[str], error: Exception) -> bool:
        self._drop(seq_ids, error, fatal=True)
        return False

    def _drop(self, seq_ids: list[str], error: Exception, *, fatal: bool = False) -> None:
        for seq_id in seq_ids:
            self._engine.abort(seq_id)
        self._send(EngineFailure(seq_ids, error, fatal))

    def _send(self, message: StepMessage) -> None:
        self.stats = self._engine.stats()  # the receiver of the message reads them
        self._post(message)

    def _post(self, message: StepMessage) -> None:
        """Deliver a message once there is a credit. While stopping it is dropped if there is none, and so are
        all later messages, so that a sequence's tokens have no gap."""
        while not self._dropping and not self._credits.acquire(timeout=0.1):
            # Redis is away and the worker stops: uncommitted tokens are computed again elsewhere.
            self._dropping = self._stopping
        if not self._dropping:
            self._deliver(message)
