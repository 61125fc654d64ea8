"""The watchdog for hanging steps. Only the end of its process ends such a step, so the worker must end."""

import asyncio

from ingine.errors import EngineError
from ingine.worker.hosting.engine_link import EngineHost


class StepHangs(EngineError):
    """A step has taken longer than its limit."""


async def watch_steps(engine: EngineHost, limit_s: float) -> None:
    """Raise StepHangs once a step has taken `limit_s` seconds."""
    while True:
        waited_s = engine.step_age_s
        if waited_s >= limit_s:
            raise StepHangs(f"a step has taken {waited_s:.0f} s: it hangs")
        await asyncio.sleep(min(limit_s / 4, limit_s - waited_s))
