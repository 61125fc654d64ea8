"""Some cases of each fuzzer in `benchmarks/fuzz`, which can run for any length of time."""

import logging
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks.fuzz.running import (
    CALLS_AT_LEAST,
    MEASURED_EVERY,
    PEAK_AT_LEAST,
    ROOT,
    TARGETS,
    Tally,
    TooMuchWork,
    case_of,
    check,
    numbered_cases,
    run_for,
    target,
)

NUM_CASES = {"http": 60, "environment": 60, "server_urls": 200, "batch_rows": 200, "batch_lines": 200}
SEED = 7


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_documented_errors_comes_of_damaged_input(name):
    logging.disable()
    try:
        fuzzed, outcomes = target(name), set()
        for number, case in numbered_cases(fuzzed, SEED):
            if number == NUM_CASES.get(name, 400):
                break
            outcomes.add(check(fuzzed, number, case))
    finally:
        logging.disable(logging.NOTSET)
    assert len(outcomes) > 1, "the cases are all valid, or none is"


def planted(check) -> SimpleNamespace:
    return SimpleNamespace(__name__="planted", cases=lambda rng: rng.randbytes(3), check=check)


def test_an_error_is_found_once_with_its_case_and_its_place():
    def broken(case: bytes) -> str:
        if case[0] < 128:
            raise KeyError(case[0] < 64)
        return "valid"

    tally = Tally()
    while tally.runs < 200:
        run_for(planted(broken), 0.0, SEED, tally)
    (finding,) = tally.findings.values()
    assert finding.times + tally.outcomes["valid"] == tally.runs == 200
    assert finding.error.startswith("KeyError") and finding.where.startswith("tests/security/test_fuzz.py:")
    assert case_of(planted(broken), SEED, finding.number) == finding.case


def test_a_case_that_hangs_ends_the_process_and_says_where():
    program = (
        "import time\n"
        "from types import SimpleNamespace\n"
        "from benchmarks.fuzz import running\n"
        "running.HANGS_S = 1\n"
        "hang = lambda case: time.sleep(600)\n"
        "target = SimpleNamespace(__name__='hangs', cases=lambda rng: b'', check=hang)\n"
        "running.run_for(target, 600.0, 1, running.Tally())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == -signal.SIGALRM and 'File "<string>", line 5 in <lambda>' in ended.stderr


@pytest.mark.parametrize(
    "work",
    [lambda: [ord("x") for _ in range(2 * CALLS_AT_LEAST)], lambda: bytearray(2 * PEAK_AT_LEAST)],
    ids=["calls", "memory"],
)
def test_work_without_bounds_is_found(work):
    def costly(case: bytes) -> str:
        work()
        return "valid"

    with pytest.raises(TooMuchWork):
        check(planted(costly), MEASURED_EVERY, b"xyz")
    assert check(planted(costly), MEASURED_EVERY + 1, b"xyz") == "valid"
