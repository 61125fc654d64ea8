"""The order in which a batch's lines are submitted, if the order of their rows does not matter."""

import json
from collections.abc import Iterable, Iterator

from ingine.producer.openai.batch_format import Line

MAX_LINES = 4096
MAX_CHARACTERS = 1 << 24
"""Of the prompts of one window, as JSON."""


def group_by_prefix(lines: Iterable[Line]) -> Iterator[Line]:
    """Yield the same lines, with those next to each other whose prompts have the same beginning, while a
    worker's prefix cache still has it.

    Lines are sorted within windows of MAX_LINES, or fewer if their prompts are long. So no line is overtaken
    by more than the others of its window, and no more lines are in memory.
    """
    window: list[tuple[str, Line]] = []
    num_characters = 0
    for line in lines:
        if line.refusal:  # it is not submitted, and has no prompt
            yield line
            continue
        prompt = _prompt(line)
        window.append((prompt, line))
        num_characters += len(prompt)
        if len(window) >= MAX_LINES or num_characters >= MAX_CHARACTERS:
            yield from _sorted(window)
            window, num_characters = [], 0
    yield from _sorted(window)


def _sorted(window: list[tuple[str, Line]]) -> Iterator[Line]:
    window.sort(key=lambda prompt_and_line: prompt_and_line[0])
    return (line for _, line in window)


def _prompt(line: Line) -> str:
    """All that decides the prompt's tokens, in the order in which a chat template has it."""
    arguments = line.arguments
    prompt = arguments.get("prompt", arguments.get("messages"))
    return json.dumps([arguments["model"], arguments.get("tools"), prompt])
