"""The thread that owns the engine. The loop and it exchange messages, a step at a time."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ingine.engine import Engine, EngineStats
from ingine.outputs import SeqOutput
from ingine.sampling_params import SamplingParams
from worker.logs import log_event

logger = logging.getLogger(__name__)

MAX_STEPS_AHEAD = 2
"""Steps that may be computed and not yet committed: one on its way to Redis while the next is computed."""

MAX_FAILED_STEPS = 10
"""Steps in a row that may raise before the engine counts as broken. Well over a job's `max_deaths`, so that a
lone poisonous job is failed before its worker gives up."""


@dataclass(slots=True)
class EngineFailure:
    """An exception out of the engine, which has let go of these sequences: those of the failed batch."""

    seq_ids: list[str]
    error: Exception
    fatal: bool
    """The engine is broken: its thread has ended."""


StepMessage = list[SeqOutput] | EngineFailure


class EngineThread:
    """Runs `engine` in a thread. Messages reach `deliver` in the loop that called `start`, in order.

    Each delivered message takes one of `MAX_STEPS_AHEAD` credits, which `credit` gives back; without one the
    engine waits. So a server that is slow or away holds the engine up instead of filling memory.
    """

    def __init__(self, engine: Engine, deliver: Callable[[StepMessage], None]):
        self._engine = engine
        self._deliver = deliver
        self._commands: deque[Callable[[], SeqOutput | None]] = deque()
        self._wake = threading.Condition()
        self._credits = threading.Semaphore(MAX_STEPS_AHEAD)
        self._stopping = False
        self._failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats: EngineStats = engine.stats()

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def add(
        self,
        seq_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int,
        output_token_ids: Sequence[int],
    ) -> None:
        self._enqueue(
            lambda: self._engine.add(
                seq_id, prompt_token_ids, params, priority=priority, output_token_ids=output_token_ids
            )
        )

    def abort(self, seq_id: str) -> None:
        """Its last output, with finish reason `abort`, is delivered like a step's. Unknown: ignored."""
        self._enqueue(lambda: self._engine.abort(seq_id))

    def credit(self) -> None:
        """A message has been dealt with: the engine may compute one step more."""
        self._credits.release()

    async def stop(self) -> None:
        """Ends the thread after the step under way. What it has delivered is to be committed after this."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _enqueue(self, command: Callable[[], SeqOutput | None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                outputs = self._turn()
            except Exception as error:
                if self._fail(error):
                    return
            else:
                self._failed_steps = 0
                if outputs:
                    self._send(outputs)
            self.stats = self._engine.stats()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._stopping or self._commands or self._engine.has_unfinished):
                self._wake.wait()
            return not self._stopping

    def _turn(self) -> list[SeqOutput]:
        """What was asked for since the last step, then one step."""
        outputs = []
        while self._commands:
            output = self._commands.popleft()()
            if output is not None:
                outputs.append(output)
        if self._engine.has_unfinished:
            outputs += self._engine.step()
        return outputs

    def _fail(self, error: Exception) -> bool:
        """Give up the batch that raised; what waits is innocent. Whether the engine is broken for good."""
        self._failed_steps += 1
        # After an error of the accelerator itself every later step fails too: let another process try.
        fatal = isinstance(error, torch.AcceleratorError) or self._failed_steps >= MAX_FAILED_STEPS
        seq_ids = self._engine.running_seq_ids
        log_event(
            logger, logging.ERROR, "step failed", sequences=len(seq_ids), fatal=fatal, error=repr(error)
        )
        logger.debug("step failed", exc_info=error)
        for seq_id in seq_ids:
            self._engine.abort(seq_id)
        self._send(EngineFailure(seq_ids, error, fatal))
        return fatal

    def _send(self, message: StepMessage) -> None:
        while not self._credits.acquire(timeout=0.1):
            if self._stopping:
                return  # Redis is away and we are to leave: what is not committed is made again elsewhere.
        self._loop.call_soon_threadsafe(self._deliver, message)
