"""Drives systems that compute step by step. All of them use this loop, so none has a better one."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from benchmarks.rivals.protocol import Recording, Request


class StepEngine(Protocol):
    def add(self, index: int, request: Request) -> None: ...

    def step(self) -> Iterable[tuple[int, Sequence[int]]]:
        """Compute one batch. Returns the indexes of requests with their new token ids."""
        ...


class Stepping:
    """Makes a `System` of a `StepEngine`."""

    def __init__(self, engine: StepEngine):
        self._engine = engine

    def run(self, requests: Sequence[Request]) -> Recording:
        to_come = deque(sorted(enumerate(requests), key=lambda item: item[1].arrival_s))
        unfinished: set[int] = set()
        recording = Recording(requests)
        while to_come or unfinished:
            while to_come and to_come[0][1].arrival_s <= recording.now_s():
                index, request = to_come.popleft()
                self._engine.add(index, request)
                unfinished.add(index)
            if not unfinished:
                time.sleep(max(0.0, to_come[0][1].arrival_s - recording.now_s()))
                continue
            for index, token_ids in self._engine.step():
                recording.tokens(index, token_ids)
                if recording.is_complete(index):
                    unfinished.discard(index)
        return recording
