"""Run all or some targets in turns, and print runs and findings of each as JSON.

`python -m benchmarks.fuzz --target T --seed S --case N` repeats a finding.
"""

import argparse
import base64
import dataclasses
import json
import logging
import sys
import time

from benchmarks.fuzz.running import TARGETS, Tally, case_of, check, run_for, target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="How long to go on.")
    parser.add_argument("--seed", type=int, default=1, help="The same seed gives the same cases.")
    parser.add_argument("--target", action="append", choices=TARGETS, help="Which one. It may be repeated.")
    parser.add_argument("--slice-s", type=float, default=20.0, help="How long a target's turn lasts.")
    parser.add_argument("--case", type=int, help="Run the case of this number alone.")
    options = parser.parse_args()
    names = options.target or TARGETS
    if options.case is not None:
        case = case_of(target(names[0]), options.seed, options.case)
        print(case)
        print(check(target(names[0]), options.case, case))
        return 0
    logging.disable()
    tallies = {name: Tally() for name in names}
    ends = time.monotonic() + 60 * options.minutes
    while time.monotonic() < ends:
        for name in names:
            left_s = ends - time.monotonic()
            if left_s <= 0:
                break
            for finding in run_for(target(name), min(options.slice_s, left_s), options.seed, tallies[name]):
                shown = dataclasses.asdict(finding) | {"case": base64.b64encode(finding.case).decode()}
                print(json.dumps({"target": name} | shown), flush=True)
        report(tallies)
    return int(any(tally.findings for tally in tallies.values()))


def report(tallies: dict[str, Tally]) -> None:
    """Print the figures. Called after each round, so an interrupted run has those of the last one."""
    for name, tally in tallies.items():
        shown = {"target": name, "runs": tally.runs, "seconds": round(tally.seconds)}
        findings = {f"{finding.where} {finding.error}": finding.times for finding in tally.findings.values()}
        print(json.dumps(shown | {"outcomes": tally.outcomes, "findings": findings}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
