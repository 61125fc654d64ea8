"""The board's state, and what each key does to it. Nothing here reads the server or draws."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from ingine.producer.watch import RunningJob, Snapshot
from ingine.top.figures import Figures


class Pane(StrEnum):
    """The list in which the arrow keys move."""

    WORKERS = "workers"
    JOBS = "jobs"


class Verb(StrEnum):
    QUIT = "quit"
    PAUSE = "pause"
    RESUME = "resume"
    DRAIN = "drain"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class Action:
    """What the caller is to do. target: the id of a worker or of a job; empty for the queue as a whole."""

    verb: Verb
    target: str = ""


_QUESTIONS = {
    Verb.PAUSE: "Pause the queue? Workers take no more jobs until it is resumed",
    Verb.RESUME: "Resume the queue?",
    Verb.DRAIN: "Drain worker {}? It hands over its jobs and exits",
    Verb.CANCEL: "Cancel job {}?",
}
_VERBS = {"p": Verb.PAUSE, "r": Verb.RESUME, "d": Verb.DRAIN, "c": Verb.CANCEL}
_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1, "pageup": -10, "pagedown": 10}


@dataclass(slots=True)
class Board:
    queue: str
    interactive: bool = True
    """False: a single frame without keys and selection."""
    snapshot: Snapshot | None = None
    """The last one that could be read."""
    read_at_s: float | None = None
    """When it was, by a monotonic clock; before the first one, when the board began."""
    figures: Figures = field(default_factory=Figures)
    tenants: Counter[str] = field(default_factory=Counter)
    """The sampled waiting jobs by tenant."""
    error: str = ""
    """Why the last read failed. Empty if it did not."""
    message: str = ""
    """The outcome of the last action."""
    show_text: bool = False
    pane: Pane = Pane.JOBS
    selected: dict[Pane, str] = field(default_factory=dict)
    """The id of the selected row of each list. A list whose selected row is gone has none."""
    asked: Action | None = None
    """An action that waits for a confirmation."""

    @property
    def workers(self) -> list[str]:
        return sorted(self.snapshot.info.workers) if self.snapshot else []

    @property
    def jobs(self) -> list[RunningJob]:
        return self.snapshot.jobs if self.snapshot else []

    def update(self, snapshot: Snapshot, figures: Figures, now_s: float) -> None:
        """Show a new snapshot. A selected row that is gone is selected no more, so no key can hit another."""
        self.snapshot, self.figures, self.read_at_s, self.error = snapshot, figures, now_s, ""
        for pane, selected in list(self.selected.items()):
            if selected not in self._rows(pane):
                del self.selected[pane]

    def press(self, key: str) -> Action | None:
        """Take a key. Returns what the caller is to do now, if anything."""
        if self.asked:
            asked, self.asked, self.message = self.asked, None, ""
            return asked if key == "y" else None
        self.message = ""
        if key == "q":
            return Action(Verb.QUIT)
        if key in _STEPS:
            self._move(_STEPS[key])
        elif key == "tab":
            self.pane = Pane.WORKERS if self.pane is Pane.JOBS else Pane.JOBS
        elif key == "t":
            self.show_text = not self.show_text
        elif key in _VERBS:
            self._ask(_VERBS[key])
        return None

    @property
    def question(self) -> str:
        """What the board asks before it acts; empty if it asks nothing."""
        return f"{_QUESTIONS[self.asked.verb].format(self.asked.target)} (y/n)" if self.asked else ""

    def _ask(self, verb: Verb) -> None:
        pane = {Verb.DRAIN: Pane.WORKERS, Verb.CANCEL: Pane.JOBS}.get(verb)
        if pane is None:
            self.asked = Action(verb)
        elif pane in self.selected:
            self.asked = Action(verb, self.selected[pane])
        else:
            one = "worker" if pane is Pane.WORKERS else "job"
            self.pane, self.message = pane, f"select a {one} first, with the arrow keys"

    def _rows(self, pane: Pane) -> list[str]:
        return self.workers if pane is Pane.WORKERS else [job.job_id for job in self.jobs]

    def _move(self, step: int) -> None:
        rows = self._rows(self.pane)
        if not rows:
            return
        selected = self.selected.get(self.pane)
        if selected is None:
            index = 0 if step > 0 else len(rows) - 1
        else:
            index = min(max(0, rows.index(selected) + step), len(rows) - 1)
        self.selected[self.pane] = rows[index]
