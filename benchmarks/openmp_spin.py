"""Measures a step while other work runs, by how long OpenMP's threads spin:
`python benchmarks/openmp_spin.py`.

Each setting has a new process, since libgomp reads it once; settings take turns, and medians are printed.
"""

import os
import subprocess
import sys
from statistics import median

from ingine.engine.request import EngineRequest

SETTINGS = {
    "default": {},
    "GOMP_SPINCOUNT=5000": {"GOMP_SPINCOUNT": "5000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
NUM_ROUNDS = 3
NUM_SEQS, NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 32, 41, 16


def step_ms() -> float:
    """Milliseconds per step, prefill included, of SmolLM2 with `NUM_SEQS` sequences."""
    import time

    from ingine.engine.config import EngineConfig
    from ingine.engine.engine import Engine
    from ingine.engine.store.model_store import DEFAULT_MODEL
    from ingine.sampling_params import SamplingParams

    engine = Engine(EngineConfig(model=DEFAULT_MODEL, max_model_len=256, enable_prefix_caching=False))
    params = SamplingParams(temperature=0, max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
    for _ in range(2):  # the first one warms up
        for number in range(NUM_SEQS):
            prompt = [(number * 7 + token * 13) % 40_000 + 100 for token in range(NUM_PROMPT_TOKENS)]
            engine.add(EngineRequest(str(number), prompt, params))
        num_steps, started = 0, time.perf_counter()
        while engine.has_unfinished:
            engine.step()
            num_steps += 1
        elapsed_s = time.perf_counter() - started
    return elapsed_s / num_steps * 1000


def measure(env: dict[str, str], *, with_rival: bool) -> float:
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if with_rival else None
    try:
        command = [sys.executable, __file__, "--measure"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP", "OMP"))}
        ended = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
    finally:
        if rival:
            rival.kill()
    return float(ended.stdout)


def main() -> None:
    results: dict[tuple[str, bool], list[float]] = {}
    for _ in range(NUM_ROUNDS):
        for name, env in SETTINGS.items():
            for with_rival in (False, True):
                results.setdefault((name, with_rival), []).append(measure(env, with_rival=with_rival))
    print(f"{'ms a step':<26}{'alone':>8}{'beside a busy process':>24}")
    for name in SETTINGS:
        alone, beside = (median(results[name, with_rival]) for with_rival in (False, True))
        print(f"{name:<26}{alone:>8.0f}{beside:>24.0f}")


if __name__ == "__main__":
    print(step_ms()) if "--measure" in sys.argv else main()
