"""How far a batch is: a bar on a terminal, a plain line now and then elsewhere. Always on stderr."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

REPORT_EVERY_S = 10.0


class TerminalProgress:
    def __init__(self, console: Console):
        self._bar = Bar(
            TextColumn("batch"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  failed {task.fields[failed]}  ETA"),
            TimeRemainingColumn(),
            console=console,
        )

    def start(self, total: int, num_done: int) -> None:
        self._num_failed = 0
        self._rate = _Rate(total, num_done)
        self._row = self._bar.add_task("batch", total=total, completed=num_done, rate="", failed=0)
        self._bar.start()

    def advance(self, *, failed: bool) -> None:
        self._num_failed += failed
        self._rate.num_done += 1
        self._bar.update(
            self._row, advance=1, failed=self._num_failed, rate=f"{self._rate.per_s:.1f} lines/s"
        )

    def stop(self) -> None:
        self._bar.stop()


class PlainProgress:
    def __init__(self, console: Console):
        self._console = console

    def start(self, total: int, num_done: int) -> None:
        self._num_failed = 0
        self._rate = _Rate(total, num_done)
        self._reported_at = time.monotonic()
        self._say(f"{total} lines, {num_done} done by an earlier run" if num_done else f"{total} lines")

    def advance(self, *, failed: bool) -> None:
        self._num_failed += failed
        self._rate.num_done += 1
        if time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._say(
                f"{self._rate.num_done}/{self._rate.total} done, {self._num_failed} failed, "
                f"{self._rate.per_s:.1f} lines/s, ETA {self._rate.eta}"
            )

    def stop(self) -> None:
        pass

    def _say(self, text: str) -> None:
        self._console.print(f"batch: {text}", highlight=False, soft_wrap=True)


class _Rate:
    """Of this run alone: what an earlier one has done took no time now."""

    def __init__(self, total: int, num_done: int):
        self.total, self.num_done = total, num_done
        self._num_resumed, self._started_at = num_done, time.monotonic()

    @property
    def per_s(self) -> float:
        return (self.num_done - self._num_resumed) / max(time.monotonic() - self._started_at, 1e-6)

    @property
    def eta(self) -> str:
        remaining_s = (self.total - self.num_done) / max(self.per_s, 1e-6)
        return str(timedelta(seconds=round(remaining_s)))


def make_progress() -> TerminalProgress | PlainProgress:
    console = Console(stderr=True)
    return TerminalProgress(console) if console.is_terminal else PlainProgress(console)
