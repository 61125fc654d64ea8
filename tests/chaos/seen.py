"""What the consumers of a job have seen of it, from their journals, and whether it is what the log has."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ingine.contract.events import TerminalEvent
from tests.chaos.outputs import Output


@dataclass
class SeenChoice:
    token_ids: dict[int, int] = field(default_factory=dict)
    """Token ids by the choice's position, starting at 1."""
    text: str = ""
    last_text: str = ""
    """Text that came without tokens."""
    finish_reason: str | None = None
    deltas: list[dict[str, Any]] = field(default_factory=list)
    last_deltas: list[dict[str, Any]] = field(default_factory=list)
    """The delta that came without tokens."""


@dataclass
class Seen:
    """The records of one job by its consumers, in order."""

    choices: dict[int, SeenChoice] = field(default_factory=lambda: defaultdict(SeenChoice))
    end: str | None = None
    results: list[list[list[Any]]] = field(default_factory=list)
    """The choices of each result that a consumer asked for: [token ids, text, finish reason, stop reason,
    message]."""
    num_attached: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices.values())

    def take(self, record: dict[str, Any]) -> None:
        if "attached" in record:
            self.num_attached += 1
            if record["attached"] != self.num_tokens:
                self.faults.append(f"came back at {record['attached']} after {self.num_tokens}")
        elif "ids" in record:
            self._take_chunk(record)
        elif "result" in record:
            self.results.append(record["result"])
        elif "end" in record:
            self.end = record["end"]

    def _take_chunk(self, record: dict[str, Any]) -> None:
        token_ids, index = record["ids"], record.get("index", 0)
        deltas = [record["delta"]] if "delta" in record else []
        choice = self.choices[index]
        if not token_ids:
            # The end of the text, repeated for a consumer that was killed before it recorded the end.
            choice.last_text, choice.last_deltas = record["text"], deltas
            return
        if record["position"] - len(token_ids) != self.num_tokens:
            self.faults.append(f"step from {self.num_tokens} to {record['position']}")
        position = record.get("choice_position") or record["position"]
        for at, token_id in enumerate(token_ids, position - len(token_ids) + 1):
            if at in choice.token_ids:
                self.faults.append(f"repeat at {at} of choice {index}")
            elif at != len(choice.token_ids) + 1:
                self.faults.append(f"gap before {at} of choice {index}")
            choice.token_ids[at] = token_id
        if choice.finish_reason is not None:
            self.faults.append(f"repeat of choice {index} after its end")
        choice.text += record["text"]
        choice.deltas += deltas
        choice.finish_reason = record.get("finish_reason")


def faults_of_seen(seen: Seen, outputs: dict[int, Output], end: TerminalEvent) -> Iterator[tuple[str, str]]:
    """Yield (kind, sentence) for each difference between what was seen and what the log has."""
    for fault in seen.faults:
        yield ("repeated" if fault.startswith("repeat") else "gaps"), f"its consumer saw a {fault}"
    for index in sorted(outputs.keys() | seen.choices.keys()):
        output, choice = outputs.get(index, Output()), seen.choices.get(index, SeenChoice())
        token_ids, text = list(choice.token_ids.values()), choice.text + choice.last_text
        if (token_ids, text) != (output.token_ids, output.text):
            yield "mismatched", f"its consumer saw {token_ids}, {text!r} of choice {index}, not {output}"
        # A stream that came back for the last text of a chat has an empty delta where the log has none.
        deltas = [delta for delta in choice.deltas + choice.last_deltas if delta]
        if deltas != [delta for delta in output.deltas if delta]:
            yield "mismatched", f"its consumer saw deltas {deltas} of choice {index}, not {output.deltas}"
        if choice.finish_reason not in (None, output.finish_reason):
            yield "mismatched", f"its consumer saw choice {index} end with {choice.finish_reason}"
    if seen.end != end.status:
        yield "mismatched", f"its consumer saw end {seen.end}"
    for result in seen.results:
        right = [
            [output.token_ids, output.text, output.finish_reason, output.stop_reason, output.message]
            for _, output in sorted(outputs.items())
        ]
        if result != right:
            yield "mismatched", f"its consumer got the result {result} for {right}"
