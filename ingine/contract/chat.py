"""The fields of a job that are a chat: messages and tools as OpenAI has them, and variables of the template.

Only shapes and sizes are checked here. Whether a chat template accepts them, its worker finds out.
"""

import json
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

MAX_MESSAGES = 4096
RESERVED_VARIABLES = frozenset(
    {"messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"}
)
"""What `chat_template_kwargs` may not name, since it has a field of its own or none."""
FUNCTION_NAME = r"^[A-Za-z0-9_.:-]{1,128}$"

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True)


def _keep(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Validate a map, and keep it as it is: the order of its keys shows in the prompt."""
    validate(value)
    return value


_AS_IT_IS = (WrapValidator(_keep), PlainSerializer(lambda value: value))


class TextPart(BaseModel):
    model_config = _STRICT

    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[tuple[TextPart, ...], Field(fail_fast=True), Tag("parts")],
    Discriminator(lambda value: "parts" if isinstance(value, tuple) else "text"),
]


class CalledFunction(BaseModel):
    model_config = _STRICT

    name: str = Field(min_length=1, max_length=128)
    arguments: Any = Field(description="A JSON object, as text or as a map.")

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                value = None
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object, or its text")
        return _json(value)


class ToolCall(BaseModel):
    model_config = _STRICT

    id: str | None = Field(default=None, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    model_config = _STRICT

    role: Annotated[str, Field(min_length=1, max_length=64)]
    name: str | None = Field(default=None, max_length=256)
    tool_calls: Annotated[tuple[Annotated[ToolCall, *_AS_IT_IS], ...], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)
    reasoning: str | None = None
    reasoning_content: str | None = None
    content: Content | None = Field(
        default=None, validate_default=True, description="Required but where there are tool calls."
    )

    @field_validator("content", "tool_calls", mode="before")
    @classmethod
    def _list_or_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("content")
    @classmethod
    def _is_there(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "Field required")
        return value

    @property
    def text(self) -> str:
        """The content without its division into parts."""
        if isinstance(self.content, tuple):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(BaseModel):
    model_config = _STRICT

    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="A JSON schema.")
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        return _json(value)


class Tool(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(BaseModel):
    model_config = _STRICT

    name: str


class NamedToolChoice(BaseModel):
    model_config = _STRICT

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("mode")] | Annotated[NamedToolChoice, Tag("named")],
    Discriminator(lambda value: "mode" if isinstance(value, str) else "named"),
]


class ChatFields(BaseModel):
    """The fields of a job that say what its chat is. None but `messages` is of use without messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    messages: Annotated[tuple[Message, ...], Field(fail_fast=True, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[tuple[Annotated[Tool, *_AS_IT_IS], ...], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = Field(default=None, description="None is auto.")
    parallel_tool_calls: bool = Field(default=True, description="False: one call at most.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="Further variables of the chat template."
    )
    add_generation_prompt: bool = Field(
        default=True, description="End the prompt with what begins the assistant's turn."
    )
    continue_final_message: bool = Field(
        default=False, description="The model goes on with the last message."
    )
    allow_special_tokens: bool = Field(
        default=False, description="Special tokens in texts are special tokens, as with transformers."
    )

    @field_validator("messages", "tools", mode="before")
    @classmethod
    def _list_or_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, value: Any) -> Any:
        if reserved := RESERVED_VARIABLES & (value or {}).keys():
            raise ValueError(f"{min(reserved)} cannot be set here")
        return _json(value)

    @model_validator(mode="after")
    def _fits_together(self):
        names = [tool["function"]["name"] for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice needs `tools`")
        if (
            isinstance(self.tool_choice, NamedToolChoice)
            and (name := self.tool_choice.function.name) not in names
        ):
            raise ValueError(f"tool_choice names {name!r:.140}, a function that is not among the tools")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=false")
        return self

    def given_without_messages(self) -> str | None:
        """The name of a field that is set, and is of use with messages alone."""
        for name, field in ChatFields.model_fields.items():
            if name != "messages" and getattr(self, name) != field.default:
                return name
        return None

    def chat_texts(self) -> Iterator[str]:
        """All texts that a chat template makes a prompt of, roughly: for an estimate of its length."""
        for message in self.messages or ():
            yield message.text
            yield message.reasoning or message.reasoning_content or ""
            yield from _texts(message.tool_calls)
        yield from _texts(self.tools)


def _texts(value: Any) -> Iterator[str]:
    """All texts and keys in a JSON value."""
    left = [value]
    while left:
        match left.pop():
            case str() as text:
                yield text
            case dict() as mapping:
                yield from (key for key in mapping if isinstance(key, str))
                left += mapping.values()
            case list() | tuple() as values:
                left += values


def _json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("must be JSON, without bytes, timestamps, NaN and infinity") from None
    return value
