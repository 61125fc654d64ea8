"""Bodies of `/v1/responses`, converted to those of a chat completion. No I/O."""

from typing import Any

from ingine.gateway.errors import Refused

_REFUSED = ("previous_response_id", "conversation", "prompt", "max_tool_calls", "moderation", "n")
"""Fields that this gateway has no way to honour. Null is fine."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "stream_options": ({},),
}
"""Unsupported fields, each with the values that have no effect."""
_SEALED = "reasoning.encrypted_content"
"""Clients ask for it to send it back later. There is none here: reasoning is readable."""
_TEXTS = ("input_text", "output_text", "text")


def chat_body(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of the chat completion that answers the same. Raises Refused.

    Other fields are passed on, for `chat_arguments` to take or to refuse.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name in ("background", "store", "stream", "metadata"):
        fields.pop(name, None)
    for name in _REFUSED:
        if name in fields:
            raise _unsupported(name)
    for name, values in _NEUTRAL.items():
        if fields.pop(name, values[0]) not in values:
            raise _unsupported(name)
    if any(each != _SEALED for each in _list("include", fields.pop("include", []))):
        raise _unsupported("include")
    chat = {"messages": _messages(fields.pop("instructions", None), fields.pop("input", None))}
    if "max_output_tokens" in fields:
        chat["max_tokens"] = fields.pop("max_output_tokens")
    if tools := _list("tools", fields.pop("tools", [])):
        chat["tools"] = [_tool(tool, number) for number, tool in enumerate(tools)]
    if "tool_choice" in fields:
        chat["tool_choice"] = _tool_choice(fields.pop("tool_choice"))
    chat |= _text(_object("text", fields.pop("text", {})))
    reasoning = _object("reasoning", fields.pop("reasoning", {}))
    if any(value is not None for value in reasoning.values()):
        raise _unsupported("reasoning")
    return fields | chat


def _messages(instructions: Any, given: Any) -> list[dict[str, Any]]:
    messages = []
    if instructions is not None:
        if not isinstance(instructions, str):
            raise _wrong("instructions", "text")
        messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise _wrong("input", "text, or a list of items")
    for number, item in enumerate(given):
        _add(messages, item, f"input.{number}")
    return messages


def _add(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    """Append an item as a message, or to the message before it."""
    if not isinstance(item, dict):
        raise _wrong(where, "an object")
    match item.get("type", "message"):
        case "message":
            messages.append({"role": item.get("role"), "content": _content(item.get("content"), where)})
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not (messages and messages[-1]["role"] == "assistant" and "tool_call_id" not in messages[-1]):
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(call)
        case "function_call_output":
            content = _content(item.get("output"), where)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
        case "reasoning":
            parts = _list(where, item.get("content") or [])
            texts = [part.get("text") for part in parts if isinstance(part, dict)]
            if text := "".join(text for text in texts if isinstance(text, str)):
                messages.append({"role": "assistant", "reasoning": text, "content": ""})
        case kind:
            raise Refused(
                400, "unsupported_content", f"{where}: items of type {kind} are not supported", param="input"
            )


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in _list(where, content):
        fields = part if isinstance(part, dict) else {}
        if fields.get("type") not in _TEXTS or not isinstance(fields.get("text"), str):
            message = f"{where}: only parts of text are supported"
            raise Refused(400, "unsupported_content", message, param="input")
        texts.append(fields["text"])
    return "".join(texts)


def _tool(tool: Any, number: int) -> dict[str, Any]:
    where = f"tools.{number}"
    fields = dict(_object(where, tool))
    if (kind := fields.pop("type", None)) != "function":
        message = f"{where}: tools of type {kind} are not supported, only functions"
        raise Refused(400, "unsupported_parameter", message, param="tools")
    return {"type": "function", "function": fields}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _text(text: dict[str, Any]) -> dict[str, Any]:
    """The fields of a chat completion for `text`."""
    fields = {name: value for name, value in text.items() if value is not None}
    chat = {"verbosity": fields.pop("verbosity")} if "verbosity" in fields else {}
    if "format" in fields:
        form = dict(_object("text.format", fields.pop("format")))
        if form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {n: v for n, v in form.items() if n != "type"}}
        chat["response_format"] = form
    if fields:
        raise _unsupported(f"text.{next(iter(fields))}")
    return chat


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object")
    return value


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(where, "a list")
    return value


def _wrong(where: str, kind: str) -> Refused:
    return Refused(400, "invalid_type", f"{where} must be {kind}", param=where.partition(".")[0])


def _unsupported(name: str) -> Refused:
    return Refused(400, "unsupported_parameter", f"{name} is not supported", param=name.partition(".")[0])
