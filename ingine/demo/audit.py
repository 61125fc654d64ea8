"""Compares what a consumer received with the token log, and counts lost and repeated tokens."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ingine.contract.events import TerminalEvent, TokensEvent, decode_event
from ingine.contract.keys import log_id


@dataclass(frozen=True)
class Audit:
    """The counts for one job. Its positions are 1..N, where N is in the terminal event's usage."""

    terminal: TerminalEvent | None
    num_tokens: int
    num_lost: int
    """Positions of 1..N that the log or the consumer lacks."""
    num_repeated: int
    """Occurrences of a position after its first, in the log and at the consumer together."""
    num_wrong: int
    """Tokens that the consumer received and the log has not or has differently, and misplaced log entries."""
    same_text: bool

    @property
    def intact(self) -> bool:
        return self.terminal is not None and self.same_text and not (
            self.num_lost or self.num_repeated or self.num_wrong
        )  # fmt: skip


def audit(log: Iterable[tuple[str, bytes]], seen: Iterable[tuple[int, list[int]]], text: str) -> Audit:
    """Audit one job.

    log: entry id and event of every entry, in order. seen: position and token ids of every chunk. text: the
    text that the consumer received.
    """
    logged, logged_text, terminal, misplaced = [], "", None, 0
    for entry_id, raw in log:
        event = decode_event(raw)
        is_tokens = isinstance(event, TokensEvent)
        misplaced += entry_id != log_id(event.position, terminal=not is_tokens) or terminal is not None
        if is_tokens:
            logged += _positions(event.position, event.token_ids)
        else:
            terminal = event
        logged_text += event.text
    consumed = [pair for position, token_ids in seen for pair in _positions(position, token_ids)]

    num_tokens = terminal.usage["num_output_tokens"] if terminal else 0
    in_log, by_consumer = (Counter(position for position, _ in pairs) for pairs in (logged, consumed))
    return Audit(
        terminal=terminal,
        num_tokens=num_tokens,
        num_lost=sum(not (in_log[p] and by_consumer[p]) for p in range(1, num_tokens + 1)),
        num_repeated=sum(n - 1 for counter in (in_log, by_consumer) for n in counter.values()),
        num_wrong=misplaced + len(set(consumed) - set(logged)),
        same_text=text == logged_text,
    )


def _positions(last: int, token_ids: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(token_ids, start=last - len(token_ids) + 1))
