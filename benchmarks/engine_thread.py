"""Measures the cost of building the engine in another thread than runs it:
`python benchmarks/engine_thread.py`.

OpenMP keeps a team of threads for each thread that has ever computed. Each case runs in a new process.
"""

import subprocess
import sys
from statistics import median
from threading import Thread

NUM_ROUNDS = 3
CASES = ("all in the main thread", "built in the main thread, run in another", "all in another thread")


def tokens_per_second(case: str) -> float:
    from ingine.bench.modes import continuous
    from ingine.bench.workload import NUM_OUTPUT_TOKENS, make_workload
    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine
    from ingine.engine.store.model_store import DEFAULT_MODEL

    engines, rates = [], []

    def build() -> None:
        config = EngineConfig(model=DEFAULT_MODEL, max_model_len=512, enable_prefix_caching=False)
        engines.append(Engine(config))

    def run() -> None:
        prompts = make_workload(engines[0].tokenizer, 32)
        for _ in range(3):  # the first one warms up
            rates.append(len(prompts) * NUM_OUTPUT_TOKENS / continuous(engines[0], prompts).wall_s)

    def in_thread(*parts) -> None:
        thread = Thread(target=lambda: [part() for part in parts])
        thread.start()
        thread.join()

    if case == CASES[0]:
        build()
        run()
    elif case == CASES[1]:
        build()
        in_thread(run)
    else:
        in_thread(build, run)
    return median(rates[1:])


def main() -> None:
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(NUM_ROUNDS):
        for case in CASES:
            ended = subprocess.run(
                [sys.executable, __file__, case], capture_output=True, text=True, check=True
            )
            rates[case].append(float(ended.stdout))
    for case in CASES:
        print(f"{case:<45}{median(rates[case]):>6.0f} tok/s")


if __name__ == "__main__":
    print(tokens_per_second(sys.argv[1])) if len(sys.argv) > 1 else main()
