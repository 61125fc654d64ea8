"""Decides how the output of a chat request is read as an assistant message."""

from collections.abc import Mapping, Sequence
from typing import Any

from ingine.engine.message_format import MessageFormat, NamedFunction, ReasoningTags, ToolChoice
from ingine.engine.parsers.choice import ModelFormats
from ingine.engine.parsers.message_parser import functions_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.text.conversation import Conversation, open_reasoning
from ingine.engine.text.detokenizer import Detokenizer, TokenBytes
from ingine.errors import ErrorCode, InvalidRequest

_LONGEST_TAG = max(len(tags.opening) for tags in REASONING_TAGS.values())


def message_format(
    formats: ModelFormats,
    conversation: Conversation,
    prompt_token_ids: Sequence[int],
    tokenizer: TokenBytes,
    *,
    tool_choice: str | Mapping[str, Any] | None = None,
    key: str = "",
) -> MessageFormat | None:
    """Return the `EngineRequest.message` of a conversation. None: there are neither tools that may be called
    nor tags of reasoning, so the content is the text of the output.

    formats: those that the model writes. prompt_token_ids: the rendered conversation; the last of them tell
    whether the reasoning has begun. tool_choice: OpenAI's; None is `auto`. key: the name of the request, of
    which the ids of tool calls are made.

    Raises InvalidRequest for tools and a tool choice that are not OpenAI's.
    """
    tools = conversation.tools or () if tool_choice != "none" else ()
    _check_tools(tools)
    choice: ToolChoice = "none"
    functions = functions_of(tools)
    if functions or tool_choice not in (None, "auto", "none"):
        choice = _tool_choice(tool_choice, functions)
    tags = None if formats.reasoning is None else REASONING_TAGS[formats.reasoning]
    if choice == "none" and tags is None:
        return None
    return MessageFormat(
        tool_format=None if choice == "none" else formats.tool_format,
        functions=functions,
        tool_choice=choice,
        reasoning=tags,
        starts_in_reasoning=tags is not None
        and _ends_within(tags, conversation, prompt_token_ids, tokenizer),
        key=key,
    )


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not (
            isinstance(function, Mapping)
            and isinstance(function.get("name"), str)
            and isinstance(function.get("parameters") or {}, Mapping)
        ):
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                'a tool is {"type": "function", "function": {"name": str, "parameters": a JSON schema}}, '
                f"not {tool!r:.100}; with tool_choice none it may be whatever the chat template takes",
            )


def _tool_choice(choice: str | Mapping[str, Any] | None, functions: Mapping[str, Any]) -> ToolChoice:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(name, str) and name in functions:
        return NamedFunction(name)
    if choice in (None, "auto"):
        return "auto"
    if choice == "required" and functions:
        return "required"
    raise InvalidRequest(
        ErrorCode.INVALID_PARAMETER,
        'tool_choice is "none", "auto", "required", or {"type": "function", "function": {"name": ...}} with '
        f"the name of one of the tools, not {choice!r:.100}",
    )


def _ends_within(
    tags: ReasoningTags, conversation: Conversation, prompt_token_ids: Sequence[int], tokenizer: TokenBytes
) -> bool:
    """Whether the prompt ends within reasoning."""
    continued = _text(conversation.messages[-1]) if conversation.continue_final_message else None
    name = open_reasoning(_end_of_text(prompt_token_ids, tokenizer), continued=continued)
    return name is not None and REASONING_TAGS[name] == tags


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _end_of_text(token_ids: Sequence[int], tokenizer: TokenBytes) -> str:
    """The end of the text, special tokens included, without the white space behind it: as much as a tag may
    take.
    """
    detokenizer, end = Detokenizer(tokenizer), b""
    for token_id in reversed(token_ids):
        end = (detokenizer.token_bytes_inside(token_id) + end).rstrip()
        if len(end) >= _LONGEST_TAG:
            break
    return end.decode(errors="replace")
