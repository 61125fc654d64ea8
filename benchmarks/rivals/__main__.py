"""Compares ingine with its rivals on this machine: `make bench-rivals`, or python -m benchmarks.rivals
--help."""

import platform
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.machine import cpu_flags, cpu_kind, report_text
from benchmarks.rivals.child import ROOT
from benchmarks.rivals.lineup import lineup
from benchmarks.rivals.plan import LOAD, REFERENCE, SYSTEMS, System
from benchmarks.rivals.report import as_json, table
from benchmarks.rivals.run import Run
from benchmarks.rivals.workloads import ARRIVALS, START_COLD, START_WARM, WORKLOADS, describe
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.tokenizer import Tokenizer

RESULTS = ROOT / "benchmarks" / "results" / f"rivals-{cpu_kind(platform.machine(), cpu_flags())}.json"
"""The file of results for this kind of machine."""
ALL_WORKLOADS = (*WORKLOADS, ARRIVALS, START_COLD, START_WARM)
NUM_ROUNDS = 3


def main(
    only: Annotated[str, typer.Option(help="Workloads, by comma.")] = ",".join(ALL_WORKLOADS),
    systems: Annotated[str, typer.Option(help="Systems, by comma.")] = ",".join(SYSTEMS),
    rounds: Annotated[
        int, typer.Option(min=1, help="Rounds; what is slow has fewer, see plan.py.")
    ] = NUM_ROUNDS,
    requests_per_s: Annotated[
        float | None,
        typer.Option(help=f"Of the arrivals. Default: {LOAD} of {REFERENCE}'s, as `mixed` measures it."),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option("--json", help="Where figures and plots go. Default: results/, but nowhere of a part."),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots, beside the figures.")] = True,
) -> None:
    """Measure all systems on all workloads, in turns: a table, a JSON file and plots."""
    chosen = [SYSTEMS[name] for name in _names(systems, SYSTEMS)]
    workloads = _names(only, ALL_WORKLOADS)
    json_path = json_path or default_path(workloads, chosen, rounds, requests_per_s)
    skipped = {system.name: system.why_not for system in chosen if system.why_not}
    chosen = [system for system in chosen if system.name not in skipped]
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log would have 80 columns, which are too few for the table

    def show(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    model = resolve_model(DEFAULT_MODEL)
    tokenizer = Tokenizer.from_folder(model)
    warm_up = [request._replace(num_tokens=8) for request in WORKLOADS["32x41"].requests(tokenizer, 0)]
    with lineup(str(model), log_folder=ROOT / ".rivals" / "logs", warm_up=warm_up) as running:
        run = Run(running, chosen, tokenizer, rounds, show, requests_per_s=requests_per_s)
        for position, workload in enumerate(workloads):
            run.measure(workload)
            # After each workload, so that an interrupted run keeps its results.
            report = as_json(
                run.results,
                model=DEFAULT_MODEL,
                num_rounds=rounds,
                workloads={name: describe(name, tokenizer) for name in workloads if name in WORKLOADS},
                systems=running.about,
                skipped=skipped,
                requests_per_s=run.requests_per_s,
            )
            if json_path:
                json_path.write_text(report_text(report))
            # Starts use processes of their own.
            to_come = set(workloads[position + 1 :]) - {START_COLD, START_WARM}
            running.close_all(but={system.name for system in chosen if system.max_rounds.keys() & to_come})
    console.print(table(report))
    if json_path is None:
        show("a part of the run, so it is not written: --json PATH does that")
        return
    show(f"written to {json_path}")
    if plots:
        command = [ROOT / ".rivals" / "plots" / "bin" / "python", "-m", "benchmarks.rivals.plots"]
        subprocess.run([*command, json_path.resolve()], cwd=ROOT, check=True)


def default_path(
    workloads: Sequence[str], systems: Sequence[System], num_rounds: int, requests_per_s: float | None
) -> Path | None:
    """The default file for the figures. Those of a partial run must not replace those of a whole one."""
    is_whole = (len(workloads), len(systems), num_rounds) == (len(ALL_WORKLOADS), len(SYSTEMS), NUM_ROUNDS)
    return RESULTS if is_whole and requests_per_s is None else None


def _names(given: str, known: Collection[str]) -> list[str]:
    """The given names, in the order of `known`."""
    names = given.split(",")
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return [name for name in known if name in names]


if __name__ == "__main__":
    typer.run(main)
