"""Which format a model writes its tool calls and its reasoning in, unless settings name one."""

from typing import NamedTuple

from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.parsers.tool_formats import TOOL_FORMATS
from ingine.errors import ConfigError


class ModelFormats(NamedTuple):
    tool_format: str
    """A name of `TOOL_FORMATS`."""
    reasoning: str | None
    """A name of `REASONING_TAGS`; None: the model does not reason between tags."""


_TOOL_FEATURES = (
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|start_header_id|>", '"parameters"'), "llama3_json"),
)
"""What a chat template contains, all of it -> the format. The first row that fits."""
_TOOL_MODEL_TYPES = {
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "hermes"),
    **dict.fromkeys(("mistral", "mistral3", "mixtral", "ministral", "ministral3"), "mistral"),
}
"""model_type of config.json -> the format, where the chat template does not tell."""
_REASONING_FEATURES = (("</think>", "think"), ("[THINK]", "mistral"))


def formats_of(model_type: str, chat_template: str | None) -> ModelFormats:
    """The formats that a model was trained on: its chat template shows them, or else its type does.

    Of a model that shows none, `generic` reads the tool calls.
    """
    template = chat_template or ""
    tool_format = next(
        (name for parts, name in _TOOL_FEATURES if all(part in template for part in parts)),
        _TOOL_MODEL_TYPES.get(model_type, "generic"),
    )
    reasoning = next((name for part, name in _REASONING_FEATURES if part in template), None)
    return ModelFormats(tool_format, reasoning)


def checked_formats(tool_format: str, reasoning: str | None) -> ModelFormats:
    """Formats that settings name. Raises ConfigError for an unknown name."""
    if tool_format not in TOOL_FORMATS:
        raise ConfigError(f"no tool format {tool_format!r}: there are {', '.join(sorted(TOOL_FORMATS))}")
    if reasoning is not None and reasoning not in REASONING_TAGS:
        raise ConfigError(f"no reasoning format {reasoning!r}: there are {', '.join(sorted(REASONING_TAGS))}")
    return ModelFormats(tool_format, reasoning)
