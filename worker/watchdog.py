"""A step that hangs: nothing in this process can end it, so the process has to go."""

import asyncio
import time

from ingine.errors import EngineError
from worker.engine_thread import EngineThread


class StepHangs(EngineError):
    pass


async def watch_steps(engine: EngineThread, limit_s: float) -> None:
    """Raises StepHangs once a step has taken `limit_s`."""
    while True:
        began = engine.step_began
        waited_s = 0.0 if began is None else time.monotonic() - began
        if waited_s >= limit_s:
            raise StepHangs(f"a step has taken {waited_s:.0f} s: it hangs")
        await asyncio.sleep(limit_s / 4 if began is None else limit_s - waited_s)
