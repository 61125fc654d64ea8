"""The report of a run, and its table."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos.audit import KINDS, Findings


@dataclass
class Report:
    seed: int
    folder: Path
    topology: str
    duration_s: float = 0.0
    num_accepted: int = 0
    counts: Counter = field(default_factory=Counter)
    """Injected faults by kind."""
    findings: Findings = field(default_factory=Findings)
    failures: list[str] = field(default_factory=list)
    """Other failures: a worker with an unclean end, a queue over its limit, a part that hangs."""

    @property
    def kept(self) -> bool:
        """True if every promise was kept."""
        return not self.findings.violations and not self.failures


def show(report: Report, console: Console) -> None:
    counts, findings = report.counts, report.findings
    table = Table(title=f"Chaos on a {report.topology}, seed {report.seed}, {report.duration_s:.0f} s")
    table.add_column("what")
    table.add_column("how often", justify="right")
    table.add_row("jobs accepted", f"{report.num_accepted:,}")
    for ending, number in sorted(findings.endings.items()):
        table.add_row(f"  {ending}", f"{number:,}")
    table.add_row("choices", f"{findings.num_choices:,}")
    table.add_row("tokens in the logs", f"{findings.num_tokens:,}")
    table.add_row("streams taken up again", f"{findings.num_resumes:,}")
    table.add_row("deaths that jobs lived through", f"{findings.num_deaths:,}", end_section=True)
    for title, prefix in (
        ("workers killed", "worker killed: "),
        ("server faults", "server: "),
        ("wire faults", "wire: "),
        ("forged messages that were heard", "forged: "),
    ):
        kinds = {
            kind.removeprefix(prefix): n for kind, n in sorted(counts.items()) if kind.startswith(prefix)
        }
        table.add_row(title, f"{sum(kinds.values()):,}")
        for kind, number in kinds.items():
            table.add_row(f"  {kind.replace('_', ' ')}", f"{number:,}")
    for kind, number in sorted(counts.items()):
        if not kind.startswith(("worker killed: ", "server: ", "wire: ", "forged: ")):
            table.add_row(kind, f"{number:,}")
    table.add_section()
    for kind, meaning in KINDS.items():
        number = findings.counts[kind]
        table.add_row(f"{kind}: {meaning}", f"[bold {'red' if number else 'green'}]{number}")
    table.add_row("other failures", f"[bold {'red' if report.failures else 'green'}]{len(report.failures)}")
    console.print(table)
    for sentence in [*report.failures, *findings.violations][:20]:
        console.print(sentence[:600], style="red", markup=False)
