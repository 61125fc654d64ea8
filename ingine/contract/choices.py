"""Choices of a job with `n` over 1: their positions in the job's log, and the shape of their ends."""

from typing import Any, Protocol

from ingine.contract.messages import is_delta, is_message


class ChoiceEvent(Protocol):
    """The part of a `TokensEvent` that names a choice."""

    token_ids: list[int]
    index: int
    choice_position: int | None
    finish_reason: str | None


class ChoicePositions:
    """Checks that the events of a log continue each choice without a gap or a repeat, up to the choice's end.

    The events of a job with n = 1 name no choice. A log has either only such events, or none.
    """

    def __init__(self, *, from_start: bool):
        """from_start: the first event to check is the log's first one. Otherwise nothing is known of a choice
        before its first event.
        """
        self._from_start = from_start
        self._positions: dict[int, int] = {}
        self._ended: set[int] = set()
        self._names_choices: bool | None = None

    def start_of(self, index: int) -> int | None:
        """The position at which the choice's next event has to begin. None if it is not known."""
        return self._positions.get(index, 0 if self._from_start else None)

    def add(self, event: ChoiceEvent) -> None:
        """Check and count the log's next event. Raises ValueError if it does not continue its choice."""
        names_choice = event.choice_position is not None
        if self._names_choices not in (None, names_choice):
            raise ValueError("some events of the log name a choice, and others do not")
        self._names_choices = names_choice
        if not names_choice:
            return
        index, start = event.index, event.choice_position - len(event.token_ids)
        if index in self._ended:
            raise ValueError(f"choice {index} continues after its end")
        if self.start_of(index) not in (None, start):
            raise ValueError(f"choice {index} continues from {start}, not {self.start_of(index)}")
        self._positions[index] = event.choice_position
        if event.finish_reason is not None:
            self._ended.add(index)


def is_choice_of_event(event: Any) -> bool:
    """Return True if the fields of a decoded `TokensEvent` that name a choice have the right types."""
    if event.choice_position is None:
        return event.index == 0 and event.finish_reason is None and event.stop_reason is None
    return (
        type(event.index) is int
        and event.index >= 0
        and type(event.choice_position) is int
        and event.choice_position >= len(event.token_ids)
        and isinstance(event.finish_reason, str | None)
        and type(event.stop_reason) in (int, str, type(None))
    )


def are_choice_ends(choices: Any) -> bool:
    """Return True if `choices` has the shape of `TerminalEvent.choices`."""
    if choices is None:
        return True
    if type(choices) is not list:
        return False
    for number, choice in enumerate(choices):
        if type(choice) is not dict or choice.get("index") != number or type(choice["index"]) is not int:
            return False
        if type(choice.get("text", "")) is not str or type(choice.get("num_output_tokens")) is not int:
            return False
        if type(choice.get("finish_reason")) is not str or choice["num_output_tokens"] < 0:
            return False
        if type(choice.get("stop_reason")) not in (int, str, type(None)):
            return False
        if "delta" in choice and not is_delta(choice["delta"]):
            return False
        if "message" in choice and not is_message(choice["message"]):
            return False
    return True
