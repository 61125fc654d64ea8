"""Keeps control tokens that a job writes in its texts from becoming control tokens of the prompt.

Texts are marked before the template is rendered, with private characters that are in none of them. The marks
in the rendered text show which control tokens the template has written by itself. transformers does so too
(`apply_chat_template(sanitize_control_tokens=True)`). Here two texts that make a control token only together,
such as two parts of a message, are kept apart as well.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Any

from ingine.engine.text.conversation import ChatPrompt

_PRIVATE_USE = range(0xF0000, 0xFFFFE)
ASSISTANT = "assistant"


class ControlTokens:
    """The control tokens of a tokenizer and its chat template."""

    def __init__(self, special: Iterable[str], in_template: Iterable[str]):
        """special: added tokens that are special.
        in_template: other added tokens that the template writes, such as `<tool_call>`. In what the assistant
            has said they stay what they are: it has written them itself, and templates look for them there.
        """
        special = {token for token in special if token}
        both = special | {token for token in in_template if token}
        self._special = _pattern(special)
        self._all = _pattern(both)
        self._beginnings = {token[:size] for token in both for size in range(1, len(token))}
        self._ends = {token[size:] for token in both for size in range(1, len(token))}
        self._longest = max(map(len, both), default=0)

    def marks(self, written: str) -> "Marks":
        """Return marks for a conversation whose texts are all in `written`."""
        return Marks(self, written)

    def wrap(self, text: str, opening: str, closing: str, *, by_assistant: bool = False) -> str:
        """Put marks around each control token, and where a text may be the beginning or end of one."""
        pattern = self._special if by_assistant else self._all
        marked = pattern.sub(lambda token: f"{opening}{token[0]}{closing}", text)
        sizes = range(1, min(len(text) + 1, self._longest))
        if any(text[:size] in self._ends for size in sizes):
            marked = opening + marked
        if any(text[-size:] in self._beginnings for size in sizes):
            marked += closing
        return marked

    def found(self, text: str, at: int) -> re.Match | None:
        """The first control token from `at` on."""
        return self._all.search(text, at)


class Marks:
    def __init__(self, tokens: ControlTokens, written: str):
        self._tokens = tokens
        self._unused = _unused(written)
        self._opening, self._closing = next(self._unused), next(self._unused)

    @property
    def chars(self) -> str:
        return self._opening + self._closing

    def mark(self, value: Any, *, by_assistant: bool = False) -> Any:
        """`value`, which is JSON, with marks in all its texts and keys."""
        if isinstance(value, str):
            return self._tokens.wrap(value, self._opening, self._closing, by_assistant=by_assistant)
        if isinstance(value, dict):
            return {self.mark(key): self.mark(each, by_assistant=by_assistant) for key, each in value.items()}
        if isinstance(value, list):
            return [self.mark(each, by_assistant=by_assistant) for each in value]
        return value

    def mark_messages(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.mark(message, by_assistant=message.get("role") == ASSISTANT) for message in messages]

    def prompt(self, rendered: str) -> ChatPrompt:
        """Take the marks away, and put a stand-in for the first character of each token that they show."""
        marks = re.compile(f"[{self.chars}]")
        text = marks.sub("", rendered)
        if len(text) == len(rendered):
            return ChatPrompt(text)
        positions, kinds = [], []
        for number, mark in enumerate(marks.finditer(rendered)):
            positions.append(mark.start() - number)
            kinds.append(mark[0])
        stand_ins: dict[str, str] = {}  # character -> stand-in
        pieces, done = [], 0
        for start in self._written_in_texts(text, positions, kinds):
            char = text[start]
            if char not in stand_ins:
                stand_ins[char] = next(self._unused)
            pieces += (text[done:start], stand_ins[char])
            done = start + 1
        pieces.append(text[done:])
        return ChatPrompt("".join(pieces), {stand_in: char for char, stand_in in stand_ins.items()})

    def _written_in_texts(self, text: str, positions: list[int], kinds: list[str]) -> Iterator[int]:
        """Where control tokens begin that are, or are partly, from the conversation's texts."""
        at = known_until = 0
        while token := self._tokens.found(text, at):
            start, end = token.span()
            before, within = bisect_right(positions, start - 1), bisect_right(positions, start)
            after = bisect_right(positions, end - 1)
            is_broken = within < after
            is_wrapped = (
                self._opening in kinds[before:within]
                and self._closing in kinds[after : bisect_right(positions, end)]
            )
            if is_broken or is_wrapped or start < known_until:
                known_until = max(known_until, end)
                yield start
                at = start + 1
            else:
                at = end


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _unused(written: str) -> Iterator[str]:
    """Private-use characters that are not in `written`."""
    used = set(written)
    return (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
