"""Choices as a consumer receives them: which tokens of each choice a stream has yielded."""

from collections import defaultdict
from dataclasses import replace

from ingine.contract.choices import ChoicePositions
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.producer.results import Choice, Chunk


class LogWentBack(Exception):
    """The server has lost events that were already read, and now has the tokens in other events."""


class YieldedChoices:
    """The tokens of each choice that a stream has yielded, over several reads of the log from its start.

    A server that crashes may lose events that a stream has yielded. The next attempt generates the same
    tokens of each choice, but the events of the choices may then follow each other in another order, so the
    position in the log does not show which tokens are new. The position in each choice does.
    """

    def __init__(self, begin: int):
        """begin: the position after which the stream begins. What the log has up to there when it is first
        read counts as yielded.
        """
        self._begin = begin
        self._yielded: dict[int, int] = {}
        self._read = ChoicePositions(from_start=begin == 0)
        self._read_from_start = begin == 0

    def needs_start(self, event: TokensEvent) -> bool:
        """Whether the log is to be read from its first event, since `event` is of several choices and what
        came before it is not known."""
        return event.choice_position is not None and not self._read_from_start

    def read_again(self) -> None:
        """Begin to read the log from its first event again."""
        self._read, self._read_from_start = ChoicePositions(from_start=True), True

    def moved(self) -> None:
        """Begin to read the log at another place, from the stream's position."""
        self._read, self._read_from_start = ChoicePositions(from_start=False), False

    def new_part(self, event: TokensEvent, position: int) -> TokensEvent | None:
        """Return the part of the log's next event that was not yielded. None if all of it was.

        position: what was read of the log before. Raises LogWentBack if the event does not continue its
        choice.
        """
        try:
            self._read.add(event)
        except ValueError as error:
            raise LogWentBack(str(error)) from None
        if event.choice_position is None:
            return without_first(event, position - event.start)
        start = event.choice_position - len(event.token_ids)
        yielded = self._yielded.get(event.index, 0)
        if self._begin > event.start:
            yielded = max(yielded, start + min(self._begin - event.start, len(event.token_ids)))
        else:
            self._begin = 0
        self._yielded[event.index] = max(yielded, event.choice_position)
        return without_first(event, yielded - start) if yielded < event.choice_position else None


def without_first(event: TokensEvent, number: int) -> TokensEvent:
    """`event` without its first tokens. Its text and its delta cannot be divided, and stay whole."""
    if number <= 0:
        return event
    logprobs = event.logprobs and event.logprobs[number:]
    return replace(event, token_ids=event.token_ids[number:], logprobs=logprobs, prompt_logprobs=None)


def last_chunks(end: TerminalEvent, *, is_parsed: bool) -> list[Chunk]:
    """Return what was held back of each choice until the job's end, as chunks without token ids.

    is_parsed: an event before it has a delta, so the job's output is parsed as a message.
    """
    chunks = []
    for choice in end.choices or [{"text": end.text, "delta": end.delta, "message": end.message}]:
        text, delta = choice.get("text", ""), choice.get("delta")
        if delta is None and (is_parsed or choice.get("message")):
            delta = {}
        if text or delta:
            index, choice_position = choice.get("index", 0), choice.get("num_output_tokens")
            chunks.append(
                Chunk(
                    text,
                    [],
                    end.position,
                    index=index,
                    choice_position=choice_position,
                    parsed=delta,
                )
            )
    return chunks


def choices_of(events: list[TokensEvent], end: TerminalEvent) -> list[Choice]:
    """Join the tokens events of a finished job, by choice. end: its terminal event."""
    ends = end.choices
    if ends is None:
        names = ("finish_reason", "stop_reason", "text", "message")
        ends = [{name: getattr(end, name) for name in names}]
    of_choice: defaultdict[int, list[TokensEvent]] = defaultdict(list)
    for event in events:
        of_choice[event.index].append(event)
    return [_choice(index, of_choice[index], its_end) for index, its_end in enumerate(ends)]


def _choice(index: int, events: list[TokensEvent], end: dict) -> Choice:
    logprobs = [entry for event in events for entry in event.logprobs or ()]
    return Choice(
        index=index,
        text="".join(event.text for event in events) + end.get("text", ""),
        token_ids=[token_id for event in events for token_id in event.token_ids],
        finish_reason=end["finish_reason"],
        stop_reason=end.get("stop_reason"),
        logprobs=logprobs or None,
        parsed=end.get("message") or next((event.message for event in events if event.message), None),
    )
