"""The protocol between harness and system under test: one JSON line per call, over the child's stdin and
stdout.

It runs in every rival's virtual environment, so it imports only the standard library.

    {"call": "load", "model": PATH, "options": {...}}
        {"versions": {...}, "settings": {...}}
    {"call": "run", "requests": [[prompt, num_tokens, arrival_s], ...]}
        {"token_times_s": [[...], ...], "first_token_ids": [...]}

Times are seconds from the run's start. A failure is answered with `{"error": "..."}`. The end of stdin ends
the child.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class Request(NamedTuple):
    prompt: list[int]
    """Token ids."""
    num_tokens: int
    """Number of tokens to generate, exactly, ignoring the end of sequence."""
    arrival_s: float = 0.0
    """Seconds from the run's start, before which a system must not know the request."""


class Recording:
    """Records when each request got its tokens. The run starts when this is created."""

    def __init__(self, requests: Sequence[Request]):
        self._requests = requests
        self._times: list[list[float]] = [[] for _ in requests]
        self._first: list[int | None] = [None] * len(requests)
        self._start = time.perf_counter()

    def now_s(self) -> float:
        return time.perf_counter() - self._start

    def tokens(self, index: int, token_ids: Sequence[int], *, at_s: float | None = None) -> None:
        """Record new tokens of request `index`, which came at `at_s`, by default now."""
        at_s = self.now_s() if at_s is None else at_s
        if token_ids and self._first[index] is None:
            self._first[index] = int(token_ids[0])
        self._times[index] += [at_s] * len(token_ids)

    def is_complete(self, index: int) -> bool:
        return len(self._times[index]) >= self._requests[index].num_tokens

    def as_answer(self) -> dict[str, Any]:
        """The answer to a call.

        Raises ValueError unless every request has exactly the tokens that it asked for.
        """
        for index, (request, times) in enumerate(zip(self._requests, self._times, strict=True)):
            if len(times) != request.num_tokens:
                raise ValueError(f"request {index} got {len(times)} tokens instead of {request.num_tokens}")
        return {"token_times_s": self._times, "first_token_ids": self._first}


class System(Protocol):
    def run(self, requests: Sequence[Request]) -> Recording: ...


@dataclass(frozen=True)
class Loaded:
    """A loaded system, with its versions and settings."""

    system: System
    versions: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)


def serve(load: Callable[[str, dict[str, Any]], Loaded]) -> None:
    """Answer calls until stdin ends. load: takes the model's path and the variant's options."""
    _die_with_parent()
    # Libraries may print. Only the protocol may use stdout, so prints go to stderr.
    wire = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    loaded: Loaded | None = None
    for line in sys.stdin:
        call = json.loads(line)
        try:
            if call["call"] == "load":
                loaded = load(call["model"], call["options"])
                answer = {"versions": loaded.versions, "settings": loaded.settings}
            else:
                requests = [Request(*request) for request in call["requests"]]
                answer = loaded.system.run(requests).as_answer()
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        wire.write(json.dumps(answer) + "\n")
        wire.flush()


def _die_with_parent() -> None:
    """Die with the parent: a child that is stopped between calls would never see the end of its stdin."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
