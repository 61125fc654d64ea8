"""What a request may ask its output to look like. Imports neither torch nor a grammar library: a grammar is
compiled where it is enforced, see `ingine.engine.grammar`."""

import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_GRAMMAR_BYTES = 128 << 10
"""UTF-8 bytes of a schema, a regular expression, a grammar, or all choices together."""
MAX_CHOICES = 1024

_NEUTRAL = (
    "disable_any_whitespace",
    "disable_additional_properties",
    "disable_fallback",
    "whitespace_pattern",
)
"""vLLM's further options, which are not supported: accepted as None or false, where they change nothing."""


class StructuredOutputsParams(BaseModel):
    """The constraint on an output: exactly one of the fields, with vLLM's names.

    A schema and a structural tag are kept as JSON text; a mapping is written as such when it is validated.
    Shape and size are checked here, and nothing else: whether the grammar is one is known when it is
    compiled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    json_schema: str | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(default=None, description="True: any JSON object.")
    regex: str | None = Field(default=None, description="Matches the whole output; Rust's syntax.")
    choice: tuple[str, ...] | None = Field(default=None, min_length=1, max_length=MAX_CHOICES)
    grammar: str | None = Field(default=None, description="llguidance's dialect of Lark, or GBNF.")
    structural_tag: str | None = Field(
        default=None, description="Structures in free text: `structures` and `triggers`, as in vLLM."
    )

    if TYPE_CHECKING:  # more is accepted than is kept: mappings, lists

        def __init__(
            self,
            *,
            json: str | dict[str, Any] | None = None,
            json_object: bool | None = None,
            regex: str | None = None,
            choice: list[str] | tuple[str, ...] | None = None,
            grammar: str | None = None,
            structural_tag: str | dict[str, Any] | None = None,
        ): ...

    @model_validator(mode="before")
    @classmethod
    def _drop_what_means_nothing(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {
            name: value
            for name, value in fields.items()
            if value is not None and not (value is False and name in ("json_object", *_NEUTRAL))
        }

    @field_validator("json_schema", "structural_tag", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"cannot be written as JSON: {error}") from None

    @field_validator("choice", mode="before")
    @classmethod
    def _list_or_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) and len(value) <= MAX_CHOICES else value

    @field_validator("json_schema", "regex", "choice", "grammar", "structural_tag")
    @classmethod
    def _not_too_large(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        num_bytes = sum(map(_num_bytes, (value,) if isinstance(value, str) else value))
        if num_bytes > MAX_GRAMMAR_BYTES:
            raise ValueError(f"has {num_bytes} bytes, and {MAX_GRAMMAR_BYTES} is the limit")
        return value

    @model_validator(mode="after")
    def _exactly_one(self):
        if len(self.model_fields_set) != 1:
            given = ", ".join(sorted(self.given())) or "none"
            raise ValueError(f"takes exactly one of {', '.join(KINDS)}, not {given}")
        return self

    @property
    def kind(self) -> str:
        """The name of the field that was given, one of `KINDS`."""
        return next(iter(self.given()))

    def given(self) -> dict[str, Any]:
        """The field that was given, as it is on the wire."""
        return self.model_dump(by_alias=True, exclude_unset=True)


KINDS = tuple(field.alias or name for name, field in StructuredOutputsParams.model_fields.items())


def _num_bytes(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode: it has half of a surrogate pair") from None
