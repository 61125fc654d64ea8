"""The progress of a batch, on stderr: a bar on a terminal, a line from time to time elsewhere."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

REPORT_EVERY_S = 10.0


class TerminalProgress:
    def __init__(self, console: Console):
        self._bar = Bar(
            TextColumn("batch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            console=console,
        )

    def start(self, total: int, num_done: int, num_failed: int) -> None:
        self._counts = _Counts(total, num_done, num_failed)
        self._row = self._bar.add_task("batch", total=total, completed=num_done, summary=self._counts.summary)
        self._bar.start()

    def advance(self, **counts: int) -> None:
        self._counts.advance(**counts)
        self._bar.update(self._row, advance=1, summary=self._counts.summary)

    def stop(self) -> None:
        self._bar.stop()


class PlainProgress:
    def __init__(self, console: Console):
        self._console, self._counts = console, None

    def start(self, total: int, num_done: int, num_failed: int) -> None:
        self._counts = _Counts(total, num_done, num_failed)
        self._reported_at = time.monotonic()
        earlier = f", {num_done} done by an earlier run, {num_failed} of them failed" if num_done else ""
        self._say(f"{total} lines{earlier}")

    def advance(self, **counts: int) -> None:
        self._counts.advance(**counts)
        if time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._say(self._counts.report)

    def stop(self) -> None:
        if self._counts and self._counts.num_run:
            self._say(self._counts.report)

    def _say(self, text: str) -> None:
        self._console.print(f"batch: {text}", highlight=False, soft_wrap=True)


class _Counts:
    """Counts of lines, with rate, share of prompt tokens that were cached, and ETA.

    The rate counts only lines that a worker answered: lines of an earlier run, and lines that were refused at
    once, took no time.
    """

    def __init__(self, total: int, num_done: int, num_failed: int):
        self.total, self.num_done, self._num_failed = total, num_done, num_failed
        self.num_run, self._started_at = 0, time.monotonic()
        self._num_prompt_tokens = self._num_cached_tokens = 0

    def advance(
        self, *, failed: bool, ran: bool, num_prompt_tokens: int = 0, num_cached_tokens: int = 0
    ) -> None:
        self.num_done += 1
        self._num_failed += failed
        self.num_run += ran
        self._num_prompt_tokens += num_prompt_tokens
        self._num_cached_tokens += num_cached_tokens

    @property
    def summary(self) -> str:
        per_s = self.num_run / max(time.monotonic() - self._started_at, 1e-6)
        eta = timedelta(seconds=round((self.total - self.num_done) / per_s)) if per_s else "unknown"
        cached = ""
        if self._num_prompt_tokens:
            cached = f"{self._num_cached_tokens / self._num_prompt_tokens:.0%} of prompt tokens cached, "
        return f"{self._num_failed} failed, {per_s:.1f} lines/s, {cached}ETA {eta}"

    @property
    def report(self) -> str:
        return f"{self.num_done}/{self.total} done, {self.summary}"


def make_progress() -> TerminalProgress | PlainProgress:
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)
