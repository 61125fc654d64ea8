"""The engine on a GPU, exactness first: `make gpu-check`, or python -m benchmarks.gpu_check --help."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.gpu_check.part import MODULES
from benchmarks.gpu_check.plan import DRY, FULL
from benchmarks.gpu_check.report import as_json
from benchmarks.gpu_check.run import ROOT, run_parts
from benchmarks.gpu_check.tables import tables

RESULTS = ROOT / "benchmarks" / "results"


def main(
    dry_run: Annotated[bool, typer.Option(help="The same code on the CPU, with tiny sizes.")] = False,
    parts: Annotated[str, typer.Option(help="Parts, by comma.")] = ",".join(MODULES),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for figures and plot. Default: results/, but nowhere of a part or dry run."
        ),
    ] = None,
) -> None:
    """Check kernels and engine for exactness, then measure. Exits with 1 if anything is not exact."""
    chosen = parts.split(",")
    if unknown := set(chosen) - set(MODULES):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(MODULES)}")
    plan = DRY if dry_run else FULL
    cells = run_parts(chosen, plan, dry_run=dry_run)
    report = as_json(cells, plan, dry_run=dry_run)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log would have 80 columns, which are too few for the tables
    for table in tables(report):
        console.print(table)
    if out is None and not dry_run and chosen == list(MODULES):
        out = RESULTS
    if out is not None and report["machine"] is not None:
        _write(report, out)
    if not report["exact"]:
        raise typer.Exit(1)


def _write(report: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", report["machine"]["name"].lower().removeprefix("nvidia "))
    path = folder / f"gpu-{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    if find_spec("matplotlib"):
        from benchmarks.gpu_check.plots import draw

        print(f"drawn {draw(report, path.with_suffix('.svg'))}")
    else:
        print("no plot: there is no matplotlib")


if __name__ == "__main__":
    typer.run(main)
