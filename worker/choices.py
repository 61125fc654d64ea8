"""Choices of a running job: what is sent and committed of each, and how each ended."""

from dataclasses import dataclass, field

from ingine.contract.calls.running import Append
from ingine.engine.outputs import SeqOutput


@dataclass(slots=True)
class CommittedChoice:
    """The part of a job's log that belongs to one choice."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Choice:
    """One choice of a running job with `n` over 1. Positions count its own tokens."""

    sent: int = 0
    """The position at which its next event begins."""
    committed: int = 0
    finish_reason: str | None = None
    """From its last event, once that is committed. None: no event has ended the choice."""
    stop_reason: int | str | None = None
    last_output: SeqOutput | None = None
    """The engine's last output of the choice."""
    last_commit: float | None = None
    """When its latest tokens were committed, by `time.monotonic`."""

    @property
    def has_ended(self) -> bool:
        """The choice has no sequence in the engine any more, even if the server has lost its last event."""
        return self.finish_reason is not None or self.last_output is not None

    def resume(self, committed: CommittedChoice) -> None:
        """Continue after the tokens of an earlier attempt."""
        self.sent = self.committed = len(committed.token_ids)
        self.finish_reason, self.stop_reason = committed.finish_reason, committed.stop_reason

    def wrote(self, append: Append) -> None:
        """Count an event that the log has."""
        self.committed = append.choice_position
        self.finish_reason, self.stop_reason = append.finish_reason, append.stop_reason

    def lost(self, append: Append) -> None:
        """Count an event that the log has lost."""
        self.committed = append.choice_position - (append.position - append.start)
        self.finish_reason = self.stop_reason = None
