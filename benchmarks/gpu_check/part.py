"""Runs one part in a process of its own, so that a hang or a broken device ends only this part.

python -m benchmarks.gpu_check.part NAME --cells FILE --until SECONDS_SINCE_THE_EPOCH [--dry-run]
"""

import argparse
import logging
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.gpu_check.cells import MACHINE, Cells
from benchmarks.gpu_check.device import describe_machine
from benchmarks.gpu_check.plan import DRY, FULL, Plan

MODULES = {
    "kernels": "kernel_checks",
    "engine": "engine_checks",
    "speed": "speed",
    "process": "hosting",
    "hf": "hugging_face",
    "settings": "settings",
    "trace": "trace",
}
"""Modules with `run(plan, cells)`, in order of execution. The last ones get the remaining time; the profiler,
which may fail with CUDA graphs, comes last."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ingine.engine.kernels.select").setLevel(logging.INFO)
    run_part(args.part, DRY if args.dry_run else FULL, args.cells, args.until)


def run_part(name: str, plan: Plan, path: Path, until: float) -> None:
    """Run a part, and add its cells to `path`. Exits if there is no such device."""
    cells = Cells(name, path, until)
    if cells.run(MACHINE, {}, describe_machine, plan.device) is None:
        sys.exit("there is no such device here: --dry-run does the same on a CPU")
    import_module(f"benchmarks.gpu_check.{MODULES[name]}").run(plan, cells)


if __name__ == "__main__":
    main()
