"""`python -m benchmarks.fuzz.guided events`: guides cases towards code that none has reached yet.

It uses atheris, Google's fuzzer for Python with libFuzzer's engine, which is no dependency of ingine:
`pip install atheris`. It covers the targets whose cases are raw bytes from outside. Cases of the others are
structures that redis-py has already parsed, for which random bytes would test nothing.
"""

import argparse
import logging
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import atheris

with atheris.instrument_imports(include=["ingine", "benchmarks.fuzz"]):
    from benchmarks.fuzz import running

    TARGETS = {
        name: running.target(name)
        for name in (
            *("jobs", "events", "control", "batch_lines", "server_urls"),
            *("gguf_header", "safetensors_header"),
        )
    }

NUM_SEEDS = 300
CASE_LIMIT_S, MAX_CASE_BYTES = 60, 6000


def main() -> None:
    """Fuzz to the end, which prints libFuzzer's statistics, or to a finding, whose case is written to a
    file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--findings", type=Path, default=Path("/tmp/ingine-fuzz"), help="Where cases go.")
    options = parser.parse_args()
    logging.disable()
    module = TARGETS[options.target]
    options.findings.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="ingine-fuzz-") as corpus:
        for number in range(NUM_SEEDS):
            Path(corpus, str(number)).write_bytes(module.cases(Random(number)))
        limits = [
            f"-max_total_time={options.seconds}",
            f"-timeout={CASE_LIMIT_S}",
            f"-max_len={MAX_CASE_BYTES}",
        ]
        where = f"-artifact_prefix={options.findings}/{options.target}-"
        atheris.Setup([sys.argv[0], corpus, *limits, where, "-print_final_stats=1"], module.check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
