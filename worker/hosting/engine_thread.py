"""The thread that owns the engine. The loop and it exchange messages, a step at a time."""

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
"""Steps that may be delivered and not yet committed: some are written to Redis while others are computed.
Those that wait meanwhile are written together (`ingine.worker.lanes`)."""

MAX_FAILED_STEPS = 10
"""Steps in a row that may raise, each with a lone sequence to blame, before the engine counts as broken."""

END_TIMEOUT_S = 1.0
"""For the end of a thread that was told to stop: it tells an engine's other ranks, if there are any."""


class EngineThread:
    """An `EngineHost` that builds an engine and then runs it, all in one thread.

    Each delivered message takes one of `MAX_STEPS_AHEAD` credits, which `credit` gives back; without one the
    engine waits. So a server that is slow or away holds the engine up instead of filling memory.

    Built in the same thread, since OpenMP keeps a team of threads for each thread that ever computed: with
    two teams it counts more threads than cores, lets them sleep early, and a step takes a quarter longer.
    """

    def __init__(self, build: Callable[[], Engine]):
        """Returns when the engine is built. Raises what `build` raises."""
        self._commands: deque[tuple[str, Callable[[], SeqOutput | None]]] = deque()
        self._wake = threading.Condition()
        self._credits = threading.Semaphore(MAX_STEPS_AHEAD)
        self._stopping = self._dropping = False
        self._failed_steps = 0
        self.step_began: float | None = None
        """When (`time.monotonic`) the step under way began."""
        self._started = threading.Event()
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._live, args=(build, built), name="engine", daemon=True)
        self._thread.start()
        self._engine = built.result()
        self.stats: EngineStats = self._engine.stats()

    @property
    def engine(self) -> Engine:
        """For what is safe from any thread: its config, its limits."""
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

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
        """As `start`, without a loop: both are called in the engine's thread, `ended` after all else."""
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
        """As if `Engine.add` had raised `error`."""

        def refuse() -> None:
            raise error

        self._enqueue(seq_id, refuse)

    def abort(self, seq_id: str) -> None:
        self._enqueue(seq_id, lambda: self._engine.abort(seq_id))

    def credit(self) -> None:
        self._credits.release()

    def request_stop(self) -> None:
        """The thread ends after the step under way."""
        with self._wake:
            self._stopping = True
            self._wake.notify()

    async def stop(self) -> None:
        self.request_stop()
        # Not a join in the loop's executor: that would hold up the exit of a process whose step hangs.
        await self._ended.wait()

    def close(self) -> None:
        """A step that hangs is left alone: nothing but the end of the process ends it."""
        self.request_stop()
        self._started.set()
        self._thread.join(END_TIMEOUT_S)

    def _enqueue(self, seq_id: str, command: Callable[[], SeqOutput | None]) -> None:
        with self._wake:
            self._commands.append((seq_id, command))
            self._wake.notify()

    def _live(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            built.set_result(build())
        except BaseException as error:
            built.set_exception(error)
            return
        self._started.wait()
        if not self._stopping:  # before it was to run
            self._run()
        self._engine.close()

    def _run(self) -> None:
        try:
            self._step_until_stopped()
        except Exception as error:  # out of what never should raise: the engine's accounts are in disorder
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
        """Of an engine that may not even know that: then nobody is to blame."""
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
        """What was asked for since the last step. Each is on its own: one that raises harms no other."""
        while self._commands:
            seq_id, command = self._commands.popleft()
            try:
                output = command()
            except Exception as error:
                self._send(EngineFailure([seq_id], error))
            else:
                if output is not None:
                    self._send([output])

    def _step(self) -> bool:
        """Whether the engine is fit for another one."""
        try:
            outputs = self._compute()
        except Exception as error:
            return self._find_culprits(error)
        self._failed_steps = 0
        if outputs:
            self._send(outputs)
        return True

    def _compute(self, *, alone: str | None = None) -> list[SeqOutput]:
        """The step itself, which alone is watched: what comes after it waits for the server."""
        self.step_began = time.monotonic()
        try:
            return self._engine.step(alone=alone)
        finally:
            self.step_began = None

    def _find_culprits(self, error: Exception) -> bool:
        """Each sequence of the batch that raised takes its step alone, so that innocents go on.

        The engine is broken, and no sequence in particular to blame, after an error of the accelerator
        itself or one of ours (a rank that is gone): every later step fails too. Likewise when several fail
        alone and none does not, or when lone ones keep failing.
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
            self._let_go(culprits, error)
        return True

    def _step_alone(self, seq_id: str) -> bool:
        if seq_id not in self._engine.running_seq_ids:
            return True  # Preempted for the sake of one before it.
        try:
            outputs = self._compute(alone=seq_id)
        except Exception:
            return False
        if outputs:
            self._send(outputs)
        return True

    def _give_up(self, seq_ids: list[str], error: Exception) -> bool:
        self._let_go(seq_ids, error, fatal=True)
        return False

    def _let_go(self, seq_ids: list[str], error: Exception, *, fatal: bool = False) -> None:
        for seq_id in seq_ids:
            self._engine.abort(seq_id)
        self._send(EngineFailure(seq_ids, error, fatal))

    def _send(self, message: StepMessage) -> None:
        self.stats = self._engine.stats()  # whoever gets the message asks for them
        self._post(message)

    def _post(self, message: StepMessage) -> None:
        """Once a message is dropped, so are all that follow: a sequence's tokens have no gap."""
        while not self._dropping and not self._credits.acquire(timeout=0.1):
            # Redis is away and we are to leave: what is not committed is made again elsewhere.
            self._dropping = self._stopping
        if not self._dropping:
            self._deliver(message)
