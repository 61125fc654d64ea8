"""`make chaos`: break everything for some minutes, then count what was lost. Exit status 1 if any."""

import argparse
import asyncio
import shutil
import sys
import tempfile
import uuid
from pathlib import Path

from rich.console import Console

from tests.chaos.run import Run
from tests.chaos.table import show

JOBS_PER_MINUTE = 240
POISON_EVERY = 160


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=uuid.uuid4().int % 100_000, help="unset: drawn")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--cluster", action="store_true", help="three nodes, instead of a primary and its replica"
    )
    options = parser.parse_args()
    console = Console()
    console.print(f"{options.minutes:g} minutes of chaos, seed {options.seed}")
    folder = Path(tempfile.mkdtemp(prefix="ingine-chaos-"))
    run = Run(
        options.seed,
        folder / "run",
        duration_s=options.minutes * 60,
        num_jobs=round(options.minutes * JOBS_PER_MINUTE),
        poison_every=POISON_EVERY,
        cluster=options.cluster,
    )
    try:
        report = asyncio.run(run.run())
    except BaseException:
        console.print(f"The run itself broke off. All logs and journals: {folder}", style="bold red")
        raise
    show(report, console)
    if not report.kept:
        console.print(f"A promise was broken. All logs and journals: {folder}", style="bold red")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
