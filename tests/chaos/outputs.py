"""The outputs of a job by choice: what the uninterrupted run has, what a log has, and whether they agree."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.record import JobStatus
from tests.chaos.snapshot import Log


@dataclass
class Output:
    """One choice of a job."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_prompt_logprobs: int = 0
    """Events with log probabilities of the prompt."""
    deltas: list[dict[str, Any]] = field(default_factory=list, compare=False)
    message: dict[str, Any] | None = field(default=None, compare=False)
    marked_text: str = field(default="", compare=False)
    """Of an answer to a chat: the text with that of special tokens."""

    def begins(self, whole: "Output") -> bool:
        """Whether this is a beginning of `whole`, however it ended."""
        # The text of a beginning may end in half a character, and so differ from the whole there.
        return self.token_ids == whole.token_ids[: len(self.token_ids)] and whole.text.startswith(
            self.text.rstrip("\ufffd")
        )


@dataclass
class Answer:
    """What a request generates without any fault."""

    outputs: list[Output]
    error: str | None = None
    """The code of the error in which it always ends."""


def write_answers(path: Path, answers: list[Answer]) -> None:
    rows = [{"outputs": [vars(output) for output in each.outputs], "error": each.error} for each in answers]
    path.write_text(json.dumps(rows))


def read_answers(path: Path) -> list[Answer]:
    rows = json.loads(path.read_text())
    return [Answer([Output(**output) for output in row["outputs"]], row["error"]) for row in rows]


def outputs_of(log: Log) -> dict[int, Output]:
    """What a log has of each choice."""
    outputs: dict[int, Output] = defaultdict(Output)
    for _, event in log.entries:
        if isinstance(event, TerminalEvent):
            _end(outputs, event)
            continue
        output = outputs[event.index]
        output.token_ids += event.token_ids
        output.text += event.text
        output.num_prompt_logprobs += event.prompt_logprobs is not None
        output.finish_reason, output.stop_reason = event.finish_reason, event.stop_reason
        _take_message(output, event.delta, event.message)
    return dict(outputs)


def _end(outputs: dict[int, Output], end: TerminalEvent) -> None:
    if end.choices is None:
        output = outputs[0]
        output.text += end.text
        output.finish_reason, output.stop_reason = end.finish_reason, end.stop_reason
        _take_message(output, end.delta, end.message)
    for choice in end.choices or ():
        output = outputs[choice["index"]]
        output.text += choice.get("text", "")
        output.finish_reason, output.stop_reason = choice["finish_reason"], choice.get("stop_reason")
        _take_message(output, choice.get("delta"), choice.get("message"))


def _take_message(output: Output, delta: dict | None, message: dict | None) -> None:
    if delta is not None:
        output.deltas.append(delta)
    output.message = message or output.message


def faults_of_choices(log: Log, num_choices: int) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for each event that does not continue its choice, and each wrong end."""
    positions: Counter[int] = Counter()
    ended: set[int] = set()
    for entry, event in log.entries:
        if isinstance(event, TokensEvent):
            yield from _faults_of_event(entry, event, num_choices, positions, ended)
            continue
        if num_choices == 1 and event.choices is not None:
            yield "wrong", f"entry {entry} names choices of a job that has one"
        for choice in event.choices or ():
            index, number = choice["index"], choice["num_output_tokens"]
            if number != positions[index]:
                yield "gaps", f"choice {index} is said to have {number} tokens, not {positions[index]}"
        if event.choices is not None and len(event.choices) != num_choices:
            yield "lost", f"{len(event.choices)} of {num_choices} choices have an end"
        if event.status is JobStatus.FINISHED and num_choices > 1 and event.choices is None:
            yield "lost", "no choice has an end"


def _faults_of_event(
    entry: str, event: TokensEvent, num_choices: int, positions: Counter[int], ended: set[int]
) -> Iterator[tuple[str, str]]:
    index, position = event.index, event.choice_position
    if (position is None) != (num_choices == 1) or index >= num_choices:
        yield "wrong", f"entry {entry} has tokens of choice {index}, the job has {num_choices}"
    if position is not None:
        start, expected = position - len(event.token_ids), positions[index]
        if start != expected:
            kind = "repeated" if start < expected else "gaps"
            yield kind, f"entry {entry} continues choice {index} from {start}, not {expected}"
        if index in ended:
            yield "repeated", f"entry {entry} continues choice {index} after its end"
        if event.finish_reason is not None:
            ended.add(index)
        positions[index] = position


def faults_of_outputs(
    outputs: dict[int, Output], answer: Answer, *, is_whole: bool
) -> Iterator[tuple[int, str]]:
    """Yield (choice, sentence) for each choice that differs. is_whole: the job has ended by itself; else its
    outputs are beginnings."""
    for index in sorted(outputs.keys() | (range(len(answer.outputs)) if is_whole else ())):
        if index >= len(answer.outputs):
            yield index, "it has a choice too many"
            continue
        right, found = answer.outputs[index], outputs.get(index, Output())
        if is_whole and found != right:
            yield index, f"{found} for {right}"
        elif not found.begins(right):
            yield index, f"{found}, which does not begin {right}"
