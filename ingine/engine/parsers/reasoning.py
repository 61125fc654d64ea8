"""Reasoning that a model writes before its answer, between tags."""

from ingine.engine.message_format import ReasoningTags
from ingine.engine.parsers.reader import Parsing, Reader
from ingine.engine.parsers.writer import Writer

REASONING_TAGS = {
    "think": ReasoningTags("<think>", "</think>"),
    "mistral": ReasoningTags("[THINK]", "[/THINK]"),
}
"""`think`: Qwen3, DeepSeek-R1, SmolLM3 and others."""


def parse_reasoning(reader: Reader, writer: Writer, tags: ReasoningTags, *, has_begun: bool) -> Parsing[None]:
    """Read the reasoning that the text begins with, if it does, up to the first closing tag.

    All of it is reasoning, tool calls and further opening tags included, and so is the whole text where the
    tag is never closed. `has_begun`: the opening tag is the end of the prompt. A model may repeat it.
    Reasoning begins nowhere but at the start: a tag behind other text is content.
    """
    reader.record()
    yield from reader.skip_space()
    if not (yield from reader.accept(tags.opening)) and not has_begun:
        writer.content(reader.recorded())
        return
    reader.forget()
    writer.begin_reasoning()
    if (yield from reader.until((tags.closing,), writer.reasoning)):
        reader.take(len(tags.closing))
        writer.end_reasoning()
