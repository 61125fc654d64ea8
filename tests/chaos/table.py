"""The one table of a run."""

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import KINDS
from tests.chaos.run import Report


def show(report: Report, console: Console) -> None:
    counts, findings = report.counts, report.findings
    table = Table(title=f"Chaos on a {report.topology}, seed {report.seed}, {report.duration_s:.0f} s")
    table.add_column("what")
    table.add_column("how often", justify="right")
    table.add_row("jobs accepted", f"{report.num_accepted:,}")
    for ending, number in sorted(findings.endings.items()):
        table.add_row(f"  {ending}", f"{number:,}")
    table.add_row("tokens in the logs", f"{findings.num_tokens:,}")
    table.add_row("streams taken up again", f"{findings.num_resumes:,}")
    table.add_row("deaths that jobs lived through", f"{findings.num_deaths:,}", end_section=True)
    for title, prefix in (
        ("workers killed", "worker killed: "),
        ("server faults", "server: "),
        ("wire faults", "wire: "),
    ):
        kinds = {
            kind.removeprefix(prefix): n for kind, n in sorted(counts.items()) if kind.startswith(prefix)
        }
        table.add_row(title, f"{sum(kinds.values()):,}")
        for kind, number in kinds.items():
            table.add_row(f"  {kind.replace('_', ' ')}", f"{number:,}")
    for kind, number in sorted(counts.items()):
        if not kind.startswith(("worker killed: ", "server: ", "wire: ")):
            table.add_row(kind, f"{number:,}")
    table.add_section()
    for kind, meaning in KINDS.items():
        number = findings.counts[kind]
        table.add_row(f"{kind}: {meaning}", f"[bold {'red' if number else 'green'}]{number}")
    table.add_row("other failures", f"[bold {'red' if report.failures else 'green'}]{len(report.failures)}")
    console.print(table)
    for sentence in [*report.failures, *findings.violations][:20]:
        console.print(sentence[:600], style="red", markup=False)
