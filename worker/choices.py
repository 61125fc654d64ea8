"""Choices of a running job: what is sent and committed of each, and how each ended."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ingine.contract.calls.running import Append
from ingine.contract.events import TokensEvent
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.errors import EngineError

if TYPE_CHECKING:
    from ingine.worker.jobs import RunningJob

_COMPLETE = (FinishReason.STOP, FinishReason.LENGTH)


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


def tokens_event(job: "RunningJob", output: SeqOutput) -> TokensEvent:
    """The next event of a job's log, with the tokens of `output`. Raises EngineError for tokens that do not
    continue the earlier ones.
    """
    start, begins = job.sent.end, output.position - len(output.token_ids)
    if not job.choices:
        event = TokensEvent(output.position, output.token_ids, output.text, output.logprobs)
        expected = start
    else:
        choice = job.choices[output.index]
        expected, choice.sent = choice.sent, output.position
        event = TokensEvent(
            start + len(output.token_ids),
            output.token_ids,
            output.text,
            output.logprobs,
            index=output.index,
            choice_position=output.position,
        )
        if output.finish_reason in _COMPLETE:
            event.text += output.final_text
            event.finish_reason, event.stop_reason = str(output.finish_reason), output.stop_reason
    if begins != expected:
        raise EngineError(f"the tokens for {job.id} do not continue its earlier ones")
    return event


def choice_ends(job: "RunningJob", *, with_text: bool) -> list[dict[str, Any]]:
    """Return `TerminalEvent.choices`. with_text: the log has all tokens to which held-back text belongs."""
    ends = []
    for index, choice in enumerate(job.choices):
        end = {"index": index, "num_output_tokens": choice.committed}
        last = choice.last_output
        reason, stop_reason, text = choice.finish_reason, choice.stop_reason, ""
        if reason is None:
            reason = str(FinishReason.ABORT)
            if with_text and last is not None:
                reason, text = str(last.finish_reason), last.final_text
                stop_reason = last.stop_reason if last.finish_reason in _COMPLETE else None
        end["finish_reason"] = reason
        if stop_reason is not None:
            end["stop_reason"] = stop_reason
        if text:
            end["text"] = text
        ends.append(end)
    return ends
