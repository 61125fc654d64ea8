"""Fuzz the parsers of a model's files for any length of time: `fuzz_model_files.py gguf --minutes 10`.

Files of a valid model are damaged in their values, their structure and their bytes, and parsed by a process
with limits of memory, of writes, and of time for each model. Any outcome other than a model or one of
ingine's errors is a finding: its files are kept, and fuzzing goes on. The damage is that of tests/security.
"""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CASE_LIMIT_S = 600.0
"""Limit of wall time for one model, for a busy machine. The limit of processor time is CPU_S."""


def fuzz(parser: str, minutes: float, seed: int, folder: Path) -> int:
    """Fuzz one parser, and return the number of findings."""
    from tests.security.model_mutations import Mutator
    from tests.security.model_parsers import Child

    slowest, outcomes, num_findings = 0.0, Counter(), 0
    mutator, child = Mutator(parser, folder / parser, seed), Child(CASE_LIMIT_S)
    child.attempt(parser, mutator.next())  # while the child starts
    started = time.monotonic()
    while time.monotonic() - started < 60 * minutes:
        model = mutator.next()
        outcome = child.attempt(parser, model)
        slowest = max(slowest, outcome.cpu_s)
        outcomes[outcome.kind] += 1
        if outcome.is_finding:
            kept = folder / "findings" / f"{parser}-{seed}-{outcomes.total()}"
            shutil.copytree(model, kept, dirs_exist_ok=True)
            num_findings += 1
            print(f"{kept}: {outcome.kind}: {outcome.message}", flush=True)
    child.close()
    figures = {"seconds": round(time.monotonic() - started), "cases": outcomes.total(), **outcomes}
    line = {
        "parser": parser,
        "seed": seed,
        **figures,
        "slowest_cpu_s": round(slowest, 2),
        "findings": num_findings,
    }
    print(json.dumps(line), flush=True)
    return num_findings


def main() -> None:
    from tests.security.model_parsers import PARSERS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parser", nargs="?", choices=list(PARSERS), help="By default all take turns.")
    parser.add_argument("--minutes", type=float, default=5.0, help="How long each parser is fuzzed.")
    parser.add_argument("--seed", type=int, default=1, help="The same seed gives the same damage.")
    parser.add_argument(
        "--folder", type=Path, default=Path("/tmp/ingine-fuzz"), help="Where models and findings are kept."
    )
    options = parser.parse_args()
    names = [options.parser] if options.parser else list(PARSERS)
    found = [fuzz(name, options.minutes, options.seed, options.folder) for name in names]
    sys.exit(1 if any(found) else 0)


if __name__ == "__main__":
    main()
