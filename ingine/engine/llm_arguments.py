"""What the methods of `LLM` take, and how it is checked."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams, is_neutral

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, {"prompt": "..."} or {"prompt_token_ids": [...]}."""
Message = Mapping[str, Any]
"""OpenAI's: {"role": ..., "content": ...}, and `tool_calls` and others."""

NEUTRAL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "tokenizer": (),
    "tokenizer_mode": ("auto",),
    "skip_tokenizer_init": (False,),
    "trust_remote_code": (False, True),  # there is no remote code that could be run
    "revision": (),
    "tokenizer_revision": (),
    "load_format": ("auto",),
    "enforce_eager": (False,),
    "enable_lora": (False,),
    "disable_log_stats": (False, True),
}
NEUTRAL_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "lora_request": (),
    "priority": (),
    "prompt_adapter_request": (),
    "tokenization_kwargs": ({},),
    "guided_options_request": (),
    # Of `chat`:
    "chat_template": (),
    "chat_template_content_format": ("auto",),
    "mm_processor_kwargs": ({},),
}
"""Options of vLLM's constructor and arguments of its methods that are not supported here, with the values
at which each changes nothing; like `ingine.sampling_params.NEUTRAL_PARAMS`."""


def refuse_unsupported(method: str, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in NEUTRAL_ARGUMENTS:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
        if not is_neutral(value, NEUTRAL_ARGUMENTS[name]):
            raise InvalidRequest(ErrorCode.INVALID_PARAMETER, f"{name} is not supported: leave it out")


def is_token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], int)


def is_one_prompt(prompts: Any) -> bool:
    return isinstance(prompts, (str, Mapping)) or is_token_ids(prompts)


def as_list(value: Any, name: str) -> list:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidRequest(ErrorCode.INVALID_TYPE, f"{name} must be a list, not {type(value).__name__}")
    return list(value)


def checked_messages(messages: Any) -> list[Message]:
    messages = as_list(messages, "a conversation")
    for message in messages:
        if not (
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and (_is_content(message.get("content")) or message.get("tool_calls"))
        ):
            raise InvalidRequest(
                ErrorCode.INVALID_MESSAGES,
                f'a message is {{"role": str, "content": str or text parts}}, not {message!r:.100}',
            )
    return messages


def _is_content(content: Any) -> bool:
    """Whether it is text, or a list of text parts."""
    parts = [{"text": content}] if not isinstance(content, list | tuple) else content
    return all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts)


def one_each(params: Any, num_prompts: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    params = as_list(params, "sampling_params")
    if len(params) != num_prompts:
        raise InvalidRequest(
            ErrorCode.INVALID_PARAMETER,
            f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one each",
        )
    return params
