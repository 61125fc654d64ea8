"""Run a target's cases. Seed and number reproduce a case. Cases may neither hang nor do unbounded work."""

import faulthandler
import importlib
import itertools
import signal
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

TARGETS = (
    *("jobs", "events", "logs", "replies", "records", "queue_state", "settings", "control"),
    *("dead_letters", "batch_lines", "batch_rows", "server_urls", "environment", "http"),
    *("gguf_header", "safetensors_header"),
)
ROOT = Path(__file__).resolve().parents[2]
HANGS_S = 60

MEASURED_EVERY = 16
"""The work of one in so many cases is measured, which makes these slow."""
CALLS_AT_LEAST, CALLS_PER_BYTE = 50_000, 60
PEAK_AT_LEAST, PEAK_PER_BYTE = 4 << 20, 200
"""Bounds of function calls and bytes of memory. Measured values stay far below, unless they grow too fast."""


class TooMuchWork(AssertionError):
    pass


@dataclass
class Finding:
    error: str
    where: str
    """Our innermost line in the traceback."""
    number: int
    case: bytes
    times: int = 1


@dataclass
class Tally:
    runs: int = 0
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)


def target(name: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.fuzz.{name}")


def case_of(module: ModuleType, seed: int, number: int) -> bytes:
    return module.cases(Random(f"{seed}:{module.__name__}:{number}"))


def numbered_cases(module: ModuleType, seed: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    for number in itertools.count(start):
        yield number, case_of(module, seed, number)


def check(module: ModuleType, number: int, case: bytes) -> str:
    """Check a case, and return the outcome.

    Raises for a finding. The work of every sixteenth case is counted.
    """
    if number % MEASURED_EVERY:
        return module.check(case)
    at_least = getattr(module, "CALLS_AT_LEAST", CALLS_AT_LEAST)
    max_calls = at_least + getattr(module, "CALLS_PER_BYTE", CALLS_PER_BYTE) * len(case)
    in_threads = getattr(module, "IN_THREADS", False)
    try:
        with bounded_work(len(case), max_calls, in_threads=in_threads):
            return module.check(case)
    except TooMuchWork:  # imports and growing tables cost once: try a second time
        with bounded_work(len(case), max_calls, in_threads=in_threads):
            return module.check(case)


@contextmanager
def bounded_work(num_bytes: int, max_calls: int, *, in_threads: bool) -> Iterator[None]:
    """Raise TooMuchWork if the block makes more calls or takes more memory than `num_bytes` of input may
    cost."""
    num_calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    tracemalloc.start()
    before = sys.getprofile()
    if not in_threads:
        sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if num_calls > max_calls:
        raise TooMuchWork(f"{num_calls} calls for {num_bytes} bytes")
    if peak > PEAK_AT_LEAST + PEAK_PER_BYTE * num_bytes:
        raise TooMuchWork(f"{peak} bytes of memory for {num_bytes} bytes")


def run_for(module: ModuleType, seconds: float, seed: int, tally: Tally) -> list[Finding]:
    """Run cases after the tally's last one for `seconds`. Returns the new findings.

    A case that hangs ends the process with a traceback, by a signal: `faulthandler.dump_traceback_later` uses
    a thread, and until Python 3.12 `tracemalloc.stop` crashes if a thread ends at that moment.
    """
    faulthandler.register(signal.SIGALRM, chain=True)
    started, new = time.monotonic(), []
    for number, case in numbered_cases(module, seed, tally.runs):
        signal.alarm(HANGS_S)
        try:
            tally.outcomes[check(module, number, case)] += 1
        except Exception as error:
            finding = Finding(f"{type(error).__name__}: {error}"[:300], _where(error), number, case)
            known = tally.findings.setdefault((type(error).__name__, finding.where), finding)
            if known is finding:
                new.append(finding)
            else:
                known.times += 1
        signal.alarm(0)
        tally.runs = number + 1
        if time.monotonic() - started >= seconds:
            break
    tally.seconds += time.monotonic() - started
    return new


def _where(error: BaseException) -> str:
    place, trace = "?", error.__traceback__
    while trace:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and ".venv" not in file.parts:
            place = f"{file.relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never waits, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


@contextmanager
def file_of(case: bytes) -> Iterator[Path]:
    """A file with `case`, in memory if there is /dev/shm."""
    memory = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=memory if memory.is_dir() else None) as file:
        file.write(case)
        file.flush()
        yield Path(file.name)


def outcome(parse: Callable[[], Any], *documented: type[BaseException]) -> tuple[Any, str]:
    """Call `parse`.

    Returns its result and `valid`, or None and `refused` after an error that it documents.
    """
    try:
        return parse(), "valid"
    except documented:
        return None, "refused"
