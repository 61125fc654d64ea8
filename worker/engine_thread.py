"""The thread that owns the engine. The loop and it exchange messages, a step at a time."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingine.engine import Engine, EngineStats

from ingine.outputs import SeqOutput
from ingine.sampling_params import SamplingParams
from worker.logs import log_event

logger = logging.getLogger(__name__)

MAX_STEPS_AHEAD = 2
"""Steps that may be computed and not yet committed: one on its way to Redis while the next is computed."""

MAX_FAILED_STEPS = 3
"""Steps in a row that may raise before the engine counts as broken."""


@dataclass(slots=True)
class EngineFailure:
    """An exception out of the engine: these sequences are lost, it has let go of them."""

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
        self._seq_ids: set[str] = set()
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
        def command() -> None:
            self._seq_ids.add(seq_id)
            self._engine.add(
                seq_id, prompt_token_ids, params, priority=priority, output_token_ids=output_token_ids
            )

        self._enqueue(command)

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
                self._fail(error)
                if self._failed_steps >= MAX_FAILED_STEPS:
                    return
            else:
                self._failed_steps = 0
                self._seq_ids.difference_update(out.seq_id for out in outputs if out.finish_reason)
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

    def _fail(self, error: Exception) -> None:
        self._failed_steps += 1
        log_event(logger, logging.ERROR, "engine failed", error=repr(error), sequences=len(self._seq_ids))
        logger.debug("engine failed", exc_info=error)
        seq_ids, self._seq_ids = sorted(self._seq_ids), set()
        for seq_id in seq_ids:
            self._engine.abort(seq_id)
        self._send(EngineFailure(seq_ids, error, fatal=self._failed_steps >= MAX_FAILED_STEPS))

    def _send(self, message: StepMessage) -> None:
        while not self._credits.acquire(timeout=0.1):
            if self._stopping:
                return  # Redis is away and we are to leave: what is not committed is made again elsewhere.
        self._loop.call_soon_threadsafe(self._deliver, message)
