"""Search for faults of the scripts or the model with new seeds: `python -m tests.contract --minutes 10`.

The first fault ends it with exit status 1 and the shortest sequence of calls that causes it.
"""

import argparse
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.contract.test_contract import fake_contract, real_contract
from tests.servers import durable_server

FAKE_EVERY = 5
"""Every fifth round runs on fakeredis; a real server is faster, and correct."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=80, help="calls a sequence")
    options = parser.parse_args()
    hunt = settings(
        max_examples=100,
        stateful_step_count=options.steps,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    num_rounds, end = 0, time.monotonic() + options.minutes * 60
    with tempfile.TemporaryDirectory() as folder, durable_server(Path(folder)) as server:
        while time.monotonic() < end:
            fake = num_rounds % FAKE_EVERY == FAKE_EVERY - 1
            run_state_machine_as_test(fake_contract() if fake else real_contract(server.url), settings=hunt)
            num_rounds += 1
            print(
                f"{num_rounds * hunt.max_examples} sequences of up to {options.steps} calls, no fault",
                flush=True,
            )


if __name__ == "__main__":
    main()
