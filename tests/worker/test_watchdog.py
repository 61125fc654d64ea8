"""When a step counts as one that hangs: by a clock of the test's own, so that nothing here waits."""

import math
from types import SimpleNamespace

import pytest

import ingine.worker.hosting.watchdog
from ingine.worker.hosting.watchdog import StepHangs, watch_steps

LIMIT_S = 10.0
TICK_S = 0.001
"""Time of everything besides the sleeps."""


class Clock:
    """The watchdog's clock, which its sleeps advance. It ends the test at `ends_at`."""

    def __init__(self, monkeypatch, ends_at: float = math.inf):
        self.now, self.num_looks, self._ends_at = 0.0, 0, ends_at
        monkeypatch.setattr(ingine.worker.hosting.watchdog, "asyncio", SimpleNamespace(sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + TICK_S
        self.num_looks += 1
        if self.now >= self._ends_at:
            raise TimeoutError


@pytest.mark.parametrize("began_at", [0.0, 1.0, 2.6, 9.9])
async def test_a_step_that_hangs_is_noticed_within_a_quarter_of_the_limit(monkeypatch, began_at):
    clock = Clock(monkeypatch, ends_at=100 * LIMIT_S)

    class Engine:
        @property
        def step_age_s(self):
            return max(0.0, clock.now - began_at)

    with pytest.raises(StepHangs, match=r"has taken 1\d s: it hangs"):
        await watch_steps(Engine(), LIMIT_S)
    assert LIMIT_S <= clock.now - began_at <= 1.25 * LIMIT_S + TICK_S


async def test_long_steps_one_after_the_other_do_not_hang_and_are_seldom_looked_at(monkeypatch):
    clock = Clock(monkeypatch, ends_at=100 * LIMIT_S)

    class Engine:
        @property
        def step_age_s(self):
            return clock.now % (0.99 * LIMIT_S)

    with pytest.raises(TimeoutError):
        await watch_steps(Engine(), LIMIT_S)
    assert 400 <= clock.num_looks <= 1000
