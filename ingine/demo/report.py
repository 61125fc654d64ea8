"""The demo's report: measured times, token counts, and whether the promise held."""

from dataclasses import dataclass

from rich.table import Table

from ingine.bench.percentile import percentile
from ingine.demo.audit import Audit
from ingine.demo.streams import Stream


@dataclass(frozen=True)
class Report:
    streams: list[Stream]
    audits: list[Audit]
    wall_s: float

    @property
    def num_finished(self) -> int:
        return sum(stream.ending == "finished" for stream in self.streams)

    @property
    def num_taken_over(self) -> int:
        """Jobs that more than one worker ran, according to their terminal events."""
        return sum(a.terminal is not None and a.terminal.timings.get("attempts", 1) > 1 for a in self.audits)

    @property
    def passed(self) -> bool:
        finished = 0 < len(self.streams) == self.num_finished
        return finished and self.num_taken_over > 0 and self._all_intact

    @property
    def _all_intact(self) -> bool:
        return all(audit.intact for audit in self.audits)

    @property
    def verdict(self) -> str:
        if self.passed:
            return "A worker was killed in mid-sentence, and every token arrived exactly once."
        if self.num_finished == len(self.streams) > 0 == self.num_taken_over and self._all_intact:
            return "No token was lost or repeated, but all jobs had ended before a worker could be killed."
        return "The promise did not hold."

    def table(self) -> Table:
        num_tokens = sum(audit.num_tokens for audit in self.audits)
        waits = [stream.first_token_s for stream in self.streams if stream.first_token_s is not None]
        rows = [
            ("requests", f"{len(self.streams)}"),
            ("finished", f"{self.num_finished}"),
            ("went on after the kill", f"{self.num_taken_over}"),
            ("output tokens", f"{num_tokens:,}"),
            ("rate, kill and hand-over included", f"{num_tokens / self.wall_s:.0f} tok/s"),
            ("time to first token, p50", f"{percentile(waits, 50):.2f} s" if waits else "-"),
            ("time to first token, p95", f"{percentile(waits, 95):.2f} s" if waits else "-"),
            ("tokens lost", f"{sum(audit.num_lost for audit in self.audits)}"),
            ("tokens repeated", f"{sum(audit.num_repeated for audit in self.audits)}"),
            ("tokens wrong", f"{sum(audit.num_wrong for audit in self.audits)}"),
            ("texts unlike the token log", f"{sum(not audit.same_text for audit in self.audits)}"),
        ]
        table = Table(title="Counted: what each consumer saw, against its token log", show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table
