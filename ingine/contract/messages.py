"""The shapes of an assistant message and of its deltas in events. They are OpenAI's, as maps.

Unknown fields are ignored, since the worker may be newer.
"""

from typing import Any


def is_delta(delta: Any) -> bool:
    """Return True if it has the shape of `TokensEvent.delta`: {content, reasoning, tool_calls}, each only
    where it adds something. A tool call is {index, id, type, function: {name, arguments}}, where id, type
    and name come once, together.
    """
    if type(delta) is not dict or not _are_texts(delta, "content", "reasoning"):
        return False
    calls = delta.get("tool_calls", [])
    if type(calls) is not list:
        return False
    after = -1
    for call in calls:
        if type(call) is not dict or type(call.get("index")) is not int or call["index"] <= after:
            return False
        if not (_is_call(call) if "id" in call else _continues_call(call)):
            return False
        after = call["index"]
    return True


def is_message(message: Any) -> bool:
    """Return True if it has the shape of `TokensEvent.message`: {role, content}, and reasoning and tool_calls
    where there are any. `content` may be None beside tool calls.
    """
    if type(message) is not dict or message.get("role") != "assistant":
        return False
    calls = message.get("tool_calls", [])
    if type(calls) is not list or not all(_is_call(call) for call in calls):
        return False
    has_content = type(message.get("content")) is str or (bool(calls) and message.get("content", "") is None)
    return has_content and _are_texts(message, "reasoning")


def _is_call(call: Any) -> bool:
    return (
        type(call) is dict
        and type(call.get("id")) is str
        and call.get("type") == "function"
        and type(function := call.get("function")) is dict
        and type(function.get("name")) is type(function.get("arguments")) is str
    )


def _continues_call(call: dict) -> bool:
    function = call.get("function")
    return (
        type(function) is dict
        and type(function.get("arguments")) is str
        and "type" not in call
        and "name" not in function
    )


def _are_texts(fields: dict, *names: str) -> bool:
    """Return True if each of the fields is text or missing."""
    return all(type(fields.get(name, "")) is str for name in names)
