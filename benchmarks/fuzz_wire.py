"""Fuzz the wire's decoders for any length of time: `python benchmarks/fuzz_wire.py --minutes 10 --seed 1`.

With atheris (`pip install atheris`) the fuzzer sees which branches its bytes reach, and breeds those that
reach new ones; without it, Hypothesis makes values at random. The properties are those of tests/security. It
stops at the first finding, and prints the bytes.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

import msgpack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MAX_BYTES = 4096


def check(raw: bytes, counts: dict[str, int]) -> None:
    from ingine.contract.jobs import Job
    from tests.security import wire_properties as properties

    if counts["executions"] % 64:  # tracing memory is slow
        job: Job | None = properties.check_job(raw)
    else:
        job = properties.check_peak(raw)
    event = properties.check_event(raw)
    counts["executions"] += 1
    counts["valid jobs"] += job is not None
    counts["valid events"] += event is not None


def report(how: str, seconds: float, counts: dict[str, int]) -> None:
    print(json.dumps({"fuzzer": how, "seconds": round(seconds), **counts}), flush=True)


def with_atheris(minutes: float, seed: int, counts: dict[str, int]) -> None:
    import atheris

    with atheris.instrument_imports(include=["ingine", "msgpack.fallback"]):
        import ingine.contract.events
        import ingine.contract.faults
        import ingine.contract.jobs  # noqa: F401
    from tests.security.wire_properties import FULL_JOB, at, packed

    seeds = [packed(FULL_JOB), packed(at(FULL_JOB, ("messages",), [{"role": "user", "content": "x"}]))]
    seeds += [packed({"type": "tokens", "position": 2, "token_ids": [1, 2], "text": "x"})]
    seeds += [packed({"type": "finished", "position": 2, "job_id": "a", "metadata": {"k": 1}})]
    function = {"name": "f", "arguments": "{}"}
    calls = [{"index": 0, "id": "c", "type": "function", "function": function}]
    message = {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": calls}
    seeds += [
        packed(
            {"type": "tokens", "position": 1, "token_ids": [1], "text": "x", "delta": {"tool_calls": calls}}
        ),
        packed({"type": "finished", "position": 2, "job_id": "a", "delta": message, "message": message}),
    ]
    started, dice = time.monotonic(), random.Random(seed)
    mutators = Values(dice, seeds)

    def one(raw: bytes) -> None:
        if time.monotonic() - started > 60 * minutes:
            report("atheris", time.monotonic() - started, counts)
            os._exit(0)  # libFuzzer has no other way to end with status 0
        check(raw, counts)

    options = [sys.argv[0], f"-seed={seed}", f"-max_len={MAX_BYTES}", "-rss_limit_mb=2048", "-timeout=20"]
    atheris.Setup(options, one, custom_mutator=mutators.mutate)
    atheris.Fuzz()


class Values:
    """Mutates msgpack values, not only bytes: half of all random byte damage stops the parser at the first
    length."""

    def __init__(self, dice: random.Random, seeds: list[bytes]):
        self._dice, self._seeds = dice, seeds

    def mutate(self, raw: bytes, max_size: int, seed: int) -> bytes:
        import atheris

        self._dice.seed(seed)
        if self._dice.random() < 0.3:
            return atheris.Mutate(raw, max_size)
        try:
            value = msgpack.unpackb(raw, strict_map_key=False)
            if not isinstance(value, dict) or not value:
                raise ValueError("no map")
        except Exception:
            value = msgpack.unpackb(self._dice.choice(self._seeds), strict_map_key=False)
        place = value
        while True:
            name = self._dice.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not (isinstance(place[name], dict | list) and place[name] and self._dice.random() < 0.8):
                break
            place = place[name]
        place[name] = self._value(3)
        try:
            mutated = msgpack.packb(value)
        except (ValueError, OverflowError, TypeError):
            return raw[:max_size]
        return mutated if len(mutated) <= max_size else raw[:max_size]

    def _value(self, depth: int):
        dice = self._dice
        match dice.randrange(12 if depth else 10):
            case 0:
                return None
            case 1:
                return dice.random() < 0.5
            case 2:
                return dice.choice([0, 1, -1, 2**31, 2**53, 2**63, 2**64 - 1, dice.getrandbits(20)])
            case 3:
                return dice.choice([0.0, -0.0, 1e308, float("nan"), float("inf"), dice.random() * 200 - 100])
            case 4:
                return dice.randbytes(dice.randrange(5))
            case 5 | 6:
                return "".join(
                    chr(dice.choice([0, 10, 27, 97, 233, 0x10FFFF])) for _ in range(dice.randrange(6))
                )
            case 7:
                return dice.choice(["high", "low", "finished", "queued", "tokens", "a", ""])
            case 8:
                return msgpack.ExtType(dice.randrange(128), dice.randbytes(2))
            case 9:
                return dice.randrange(1000)
            case 10:
                return [self._value(depth - 1) for _ in range(dice.randrange(4))]
            case _:
                return {self._key(): self._value(depth - 1) for _ in range(dice.randrange(4))}

    def _key(self):
        return self._dice.choice([0, 7, "key", "code", b"x", None, 1.5, "\x1b[2J", "temperature"])


def with_hypothesis(minutes: float, seed: int, counts: dict[str, int]) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded

    from tests.security.test_fuzz_wire import FIELDS, values
    from tests.security.wire_properties import FULL_JOB, at, packed

    started = time.monotonic()
    patience = settings(
        max_examples=5000, deadline=None, database=None, derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for round_number in range(10**9):
        path = FIELDS[round_number % len(FIELDS)]

        @seeded(seed * 10_007 + round_number)
        @patience
        @given(values)
        def round_of(value):
            if time.monotonic() - started < 60 * minutes:
                check(packed(at(FULL_JOB, path, value)), counts)  # noqa: B023
                check(packed(value), counts)

        round_of()
        if time.monotonic() - started > 60 * minutes:
            return report("hypothesis", time.monotonic() - started, counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="How long to go on.")
    parser.add_argument("--seed", type=int, default=1, help="The same seed gives the same cases.")
    parser.add_argument(
        "--fuzzer", choices=["atheris", "hypothesis"], help="By default atheris, if it is there."
    )
    options = parser.parse_args()
    try:
        import atheris  # noqa: F401

        fuzzer = options.fuzzer or "atheris"
    except ImportError:
        fuzzer = options.fuzzer or "hypothesis"
    run = with_atheris if fuzzer == "atheris" else with_hypothesis
    run(options.minutes, options.seed, dict.fromkeys(("executions", "valid jobs", "valid events"), 0))


if __name__ == "__main__":
    main()
