"""Bodies of OpenAI's chat and text completions, converted to arguments of `submit`. No I/O.

A field that is not supported is refused by name, unless its value has no effect: a request never runs as
anything other than what it asks for. `docs/reference/request-fields.md` lists what becomes of each field.
"""

import json
from typing import Any

from ingine.errors import ClientError
from ingine.sampling_params import NEUTRAL_PARAMS, SamplingParams, is_neutral

_IGNORED = {
    *("user", "store", "metadata", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
}
"""Fields that never change the output."""
_NEUTRAL: dict[str, tuple[Any, ...]] = NEUTRAL_PARAMS | {
    # OpenAI's:
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    # vLLM's:
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "include_reasoning": (True,),
    "truncation_side": ("left",),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}
"""Unsupported fields, each with the values that have no effect. Null never has one."""
_RENAMED = {"max_completion_tokens": "max_tokens"}
_OF_CHATS = (
    *("tools", "tool_choice", "parallel_tool_calls"),
    *("chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
)
"""Fields of a chat completion that `submit` has under the same names."""
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("refusal", "audio", "function_call"), ()),
    "annotations": ([],),
}
"""Fields of the messages that OpenAI's API returns, and so of those that are sent back, like `_NEUTRAL`."""


class RequestRefused(ClientError):
    """A request that cannot be run. code: as in `ErrorCode`, or OpenAI's. param: the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


def chat_arguments(body: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    """Convert the body of a chat completion. model: overrides the body's. Raises RequestRefused.

    What `submit` refuses anyway, such as a parameter out of range, is passed on.
    """
    fields = _given(body)
    named = fields.pop("model", None)
    arguments = {"model": model or named, "messages": _messages(fields.pop("messages", None))}
    if fields.get("tools") == []:
        del fields["tools"]
    _check_tool_choice(fields.get("tool_choice"))
    arguments |= {name: fields.pop(name) for name in _OF_CHATS if name in fields}
    return arguments | {"sampling": _sampling(fields, chat=True)}


def completion_arguments(body: dict[str, Any], model: str | None = None) -> dict[str, Any]:
    """Convert the body of a text completion, like `chat_arguments`. `echoes` reads its field `echo`."""
    fields = _given(body)
    named = fields.pop("model", None)
    fields.pop("echo", None)
    return {
        "model": model or named,
        "prompt": _prompt(fields.pop("prompt", None)),
        "sampling": _sampling(fields, chat=False),
    }


def echoes(body: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Return True if the text of a completion is to begin with its prompt, whose text only the client has.

    arguments: what `completion_arguments` has returned for `body`. Raises RequestRefused.
    """
    echo, sampling = body.get("echo"), arguments["sampling"]
    if not echo:
        return False
    if echo is not True:
        raise RequestRefused("invalid_parameter", "echo must be true or false", "echo")
    if not isinstance(arguments["prompt"], str):
        raise RequestRefused("unsupported_parameter", "echo: the prompt must be text, not token ids", "echo")
    for name in ("logprobs", "truncate_prompt_tokens"):
        if sampling.get(name) is not None:
            raise RequestRefused("unsupported_parameter", f"echo is not supported with {name}", "echo")
    return True


def _given(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if value is not None}


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestRefused("invalid_messages", "messages must be a list of objects", "messages")
    return [_message(message, number) for number, message in enumerate(messages)]


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    fields = {
        name: value
        for name, value in message.items()
        if value is not None and value not in _NEUTRAL_IN_MESSAGES.get(name, ())
    }
    if fields.get("content") is not None or not fields.get("tool_calls"):
        fields["content"] = _content(fields.get("content"), f"messages.{number}.content")
    return fields


def _content(content: Any, where: str) -> str:
    """The content as text; parts of type text are joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestRefused("invalid_messages", f"{where} must be text or a list of text parts", where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            message = f"{where}: only parts of type text are supported"
            raise RequestRefused("unsupported_content", message, where)
    return "".join(part["text"] for part in content)


def _check_tool_choice(tool_choice: Any) -> None:
    """Refuse OpenAI's further kinds of choices. Leaves other faults to `submit`."""
    kind = tool_choice.get("type") if isinstance(tool_choice, dict) else None
    if kind in ("allowed_tools", "custom"):
        message = f"tool_choice of type {kind} is not supported: name a function, or leave out other tools"
        raise RequestRefused("unsupported_parameter", message, "tool_choice")


def _structured_outputs(response_format: Any) -> dict[str, Any] | None:
    """Convert a `response_format` to `structured_outputs`. None for text. Raises RequestRefused."""
    fields = dict(response_format) if isinstance(response_format, dict) else {}
    match fields.pop("type", None):
        case "text":
            constraint = None
        case "json_object":
            constraint = {"json_object": True}
        case "json_schema":
            constraint = {"json": _schema(fields.pop("json_schema", None))}
        case "structural_tag":  # vLLM's
            return {"structural_tag": fields}
        case _:
            message = (
                "response_format must be an object with a `type`: text, json_object, json_schema or "
                "structural_tag"
            )
            raise RequestRefused("invalid_parameter", message, "response_format")
    if fields:
        message = f"response_format: {next(iter(fields))} is not supported beside this type"
        raise RequestRefused("unsupported_parameter", message, "response_format")
    return constraint


def _schema(fields: Any) -> str:
    """The JSON schema of a response format, as text: a job is not nested as deep as a schema may be."""
    where = "response_format.json_schema"
    if not isinstance(fields, dict) or not isinstance(fields.get("schema"), dict):
        message = f"{where} must be an object with a `name` and a `schema`, which is an object"
        raise RequestRefused("invalid_parameter", message, "response_format")
    if unknown := fields.keys() - {"name", "description", "schema", "strict"}:
        message = f"{where}: {min(unknown)} is not supported"
        raise RequestRefused("unsupported_parameter", message, "response_format")
    try:
        return json.dumps(fields["schema"], ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise RequestRefused("invalid_parameter", f"{where}: {error}", "response_format") from None


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise RequestRefused("unsupported_parameter", "prompt: one prompt a line, not several", "prompt")
        return prompt[0]
    return prompt


def _sampling(fields: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    sampling = {}
    neutral = _NEUTRAL | {"add_special_tokens": (not chat,)}  # what a worker does anyway
    if "max_completion_tokens" in fields:
        fields.pop("max_tokens", None)  # its older name
    if chat:  # a completion's `logprobs` is the number itself
        wanted, num_top = fields.pop("logprobs", False), fields.pop("top_logprobs", 0)
        if not isinstance(wanted, bool):
            raise RequestRefused("invalid_parameter", "logprobs must be true or false", "logprobs")
        if wanted:
            sampling["logprobs"] = num_top
        elif num_top:
            raise RequestRefused("invalid_parameter", "top_logprobs needs logprobs: true", "top_logprobs")
    if (response_format := fields.pop("response_format", None)) is not None:
        constraint = _structured_outputs(response_format)
        if constraint and "structured_outputs" in fields:
            message = "response_format cannot be combined with structured_outputs"
            raise RequestRefused("invalid_parameter", message, "response_format")
        sampling |= {"structured_outputs": constraint} if constraint else {}
    for name, value in fields.items():
        if name == "n" and is_neutral(value, (1,)):
            continue
        if _RENAMED.get(name, name) in SamplingParams.model_fields:
            sampling[_RENAMED.get(name, name)] = _bias(value) if name == "logit_bias" else value
        elif name not in _IGNORED and not is_neutral(value, neutral.get(name, ())):
            raise RequestRefused("unsupported_parameter", f"{name} is not supported", name)
    return sampling


def _bias(bias: Any) -> Any:
    """Make the keys integers, which JSON lacks. Leaves a bad value to validation, which names the fault."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (AttributeError, ValueError):
        return bias
