"""The assistant messages of chats: what a text is, and whether a log's deltas and messages agree with it."""

from collections.abc import Iterable, Iterator
from typing import Any

from ingine.engine.message_format import MessageFormat
from ingine.engine.parsers.message_parser import MessageParser, functions_of, parser_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.message import MessageAssembly, MessageDelta
from tests.chaos.outputs import Answer, Output
from tests.chaos.requests import Request

PARSERS = {"tool_parser": "hermes", "reasoning_parser": "think"}
"""The workers' settings."""


def put_together(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for deltas that do not follow each other."""
    assembly = MessageAssembly()
    for delta in deltas:
        assembly.add(MessageDelta.from_openai(delta))
    return assembly.message().to_openai()


def finish_reason(request: Request, text: str, reason: str) -> str:
    """The finish reason of a choice that is `text`, special tokens included, and ended for `reason`."""
    return _parsed(request, text, "", 0).finish_reason(reason)


def faults_of_messages(
    outputs: dict[int, Output], answer: Answer, request: Request, job_id: str
) -> Iterator[tuple[int, str]]:
    """Yield (choice, sentence) for each choice of a finished job whose message is not that of its text."""
    for index, right in enumerate(answer.outputs):
        found, message = outputs.get(index, Output()), None
        if request.is_chat:
            message = _parsed(request, right.marked_text, job_id, index).message().to_openai()
            if put_together(found.deltas) != message:
                yield index, f"its deltas {found.deltas} do not make {message}"
        elif found.deltas:
            yield index, f"it has deltas {found.deltas} and is no chat"
        if found.message != message:
            yield index, f"its message is {found.message}, not {message}"


def _parsed(request: Request, text: str, job_id: str, index: int) -> MessageParser:
    functions = functions_of(request.input.get("tools", ()))
    tool_format, choice = (PARSERS["tool_parser"], "auto") if functions else (None, "none")
    tags = REASONING_TAGS[PARSERS["reasoning_parser"]]
    format = MessageFormat(tool_format, functions, choice, tags, key=job_id)
    parser = parser_of(format, index)
    parser.feed(text)
    parser.flush()
    return parser
