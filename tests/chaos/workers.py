"""A real worker in a forked process, with an injected fault. The product has no hook for faults: its calls
are wrapped from outside."""

import asyncio
import functools
import itertools
import os
import random
import signal
import time

import torch
from redis.exceptions import ConnectionError

from ingine.cli.worker import _serve, build_engine
from ingine.engine.run.model_runner import ModelRunner
from ingine.engine.schedule.scheduler import ScheduledBatch
from ingine.worker.logs import setup_logging
from ingine.worker.queue import Queue
from ingine.worker.settings import WorkerSettings
from tests.chaos.jobs import POISON
from tests.chaos.schedule import CRASH_CALLS


def run(*, settings: dict, fate: dict) -> None:
    """Run `ingine worker` until SIGTERM or the fault.

    Raises if the engine's state is inconsistent at the end.
    """
    torch.set_num_threads(1)
    settings = WorkerSettings(_env_file=None, **settings)
    setup_logging(settings.log_level, as_json=False)
    engine, model = build_engine(settings)
    meet(engine.engine.tokenizer.encode(POISON), name=settings.worker_id, **fate)
    asyncio.run(_serve(settings, settings.redis_url, engine, model))
    engine.engine.check_integrity()


def meet(
    poison: list[int],
    *,
    name: str = "",
    clock_offset_s: float = 0.0,
    crash: tuple[str, int, str] | None = None,
    lose_every: int | None = None,
    raise_at_step: int | None = None,
    hang_at_step: int | None = None,
    step_s: float = 0.0,
) -> None:
    """Inject the faults of a fate.

    crash: (call, its number, before, amid or after), where it gets `kill -9`. raise_at_step, hang_at_step:
    the runner raises or hangs. lose_every: of so many calls of its queue, one loses its reply on average;
    `name` decides which. step_s: additional time of each step. A batch with a prompt that begins with POISON
    kills any worker.
    """
    if clock_offset_s:
        right = time.time
        time.time = lambda: right() + clock_offset_s
    if lose_every:
        # Drawn, not counted: a loop of three calls would lose the same one's reply for ever.
        draw = random.Random(f"{name}:lost")
        for call in CRASH_CALLS:
            setattr(Queue, call, _losing(getattr(Queue, call), draw, lose_every))
    if crash:
        call, number, when = crash
        setattr(Queue, call, _crashing(getattr(Queue, call), number, when))
    ModelRunner.forward = _failing(ModelRunner.forward, poison, raise_at_step, hang_at_step, step_s)


def die(why: str) -> None:
    os.write(2, f"chaos: {why}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)


def _losing(call, draw: random.Random, lose_every: int):
    @functools.wraps(call)
    async def losing(*args, **options):
        answer = await call(*args, **options)
        if draw.random() * lose_every < 1:
            os.write(2, b"chaos: reply lost\n")
            raise ConnectionError("chaos: the reply is lost")
        return answer

    return losing


def _crashing(call, number: int, when: str):
    numbers = itertools.count(1)

    @functools.wraps(call)
    async def crashing(*args, **options):
        if next(numbers) != number:
            return await call(*args, **options)
        if when == "after":
            await call(*args, **options)
        elif when == "amid":  # the command is in flight
            under_way = asyncio.ensure_future(call(*args, **options))
            await asyncio.wait({under_way}, timeout=0.0005)
        die(f"crash {when} {call.__name__}")

    return crashing


def _failing(forward, poison: list[int], raise_at: int | None, hang_at: int | None, step_s: float):
    steps = itertools.count(1)

    @functools.wraps(forward)
    def failing(self, batch: ScheduledBatch):
        step = next(steps)
        time.sleep(step_s)
        if step == raise_at:
            os.write(2, b"chaos: step raises\n")
            raise RuntimeError("chaos: this step raises")
        if step == hang_at:
            os.write(2, b"chaos: step hangs\n")
            time.sleep(3600)
        if any(seq.token_ids[: len(poison)] == poison for seq in batch.seqs):
            die("poison")
        return forward(self, batch)

    return failing
