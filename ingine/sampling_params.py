"""Sampling parameters of a request, shared by the engine, the wire format and `LLM`. Imports no torch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from ingine.structured_outputs import StructuredOutputsParams

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
"""The most characters of one stop string. As much text may be held back as a possible start of one."""
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 32_768
"""Limit for the log probabilities of a prompt: its tokens, times 1 + `prompt_logprobs`."""
MAX_LOGIT_BIASES = 1024
MAX_CHOICES = 128
"""The most choices of any request. A worker accepts `max_choices` of them."""
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 64
"""Limit for the characters of one of `bad_words`. Each word is tokenised at admission."""

NEUTRAL_PARAMS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "prompt_logprob_token_ids": (),
    "prompt_logprob_start": (),
    "logprob_token_ids": (),
    "flat_logprobs": (False,),
    "output_kind": (0, 2),  # CUMULATIVE, FINAL_ONLY: `LLM.generate` returns once, at the end
    "stream_interval": (),
    "skip_clone": (False, True),
    "guided_decoding": (),
    "logits_processors": ([],),
    "skip_reading_prefix_cache": (False,),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (),
    "extra_args": ({},),
}
"""Parameters of vLLM that are not supported here, with the values at which each changes nothing. None is
always such a value. Any other value is rejected, and the error names the parameter."""


def is_neutral(value: Any, neutral_values: Iterable[Any]) -> bool:
    value = getattr(value, "value", value)  # of an enum
    return value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)  # True == 1
        for neutral in neutral_values
    )


class SamplingParams(BaseModel):
    """Sampling parameters with vLLM's names and meanings.

    The token at output position p is drawn with one uniform number that depends only on (seed, p). So a
    request that is batched differently, preempted or resumed elsewhere draws the same tokens.

    A field that is None counts as not given. `given` returns the fields that were given; in a job the others
    take the model's own defaults, see `RequestLimits.with_defaults`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    n: int = Field(
        default=1,
        ge=1,
        le=MAX_CHOICES,
        description="Choices to generate. Choice i is what a request with the seed `seed` + i generates.",
    )
    temperature: float = Field(default=1.0, ge=0, le=100, description="0 is greedy.")
    top_k: int = Field(default=0, ge=-1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Drop tokens below min_p times the likeliest one's."
    )
    repetition_penalty: float = Field(default=1.0, gt=0, le=100, description="Over prompt and output tokens.")
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="Over output tokens.")
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Over output tokens, per occurrence."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="None: drawn when the request is added."
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Of the output. None: as many as the engine's longest sequence leaves.",
    )
    min_tokens: int = Field(default=0, ge=0, description="No end of sequence before this many output tokens.")
    stop: tuple[str, ...] = Field(
        default=(), fail_fast=True, description="Strings that end the output; not part of its text."
    )
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), fail_fast=True)
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Report the chosen token's logprob and this many top ones.",
    )
    structured_outputs: StructuredOutputsParams | None = Field(
        default=None, description="What the output has to look like."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Report the logprob of each prompt token but the first, and this many top ones.",
    )
    bad_words: tuple[str, ...] = Field(
        default=(), fail_fast=True, description="Words that are never generated, whatever precedes them."
    )
    allowed_token_ids: tuple[TokenId, ...] | None = Field(
        default=None, description="Only these tokens are generated. None: all."
    )
    include_stop_str_in_output: bool = Field(
        default=False, description="The text ends behind the stop string or stop token, not before it."
    )
    skip_special_tokens: bool = Field(default=True, description="Special tokens add nothing to the text.")
    spaces_between_special_tokens: bool = Field(
        default=True,
        description="False: no space between special tokens that follow each other. Only some tokenizers put "
        "one there.",
    )
    detokenize: bool = Field(default=True, description="False: the output has no text, only token ids.")
    truncate_prompt_tokens: int | None = Field(
        default=None,
        ge=-1,
        lt=2**31,
        description="Keep only this many tokens of the prompt, the last ones. -1: as many as the model's "
        "length leaves beside max_tokens.",
    )

    if TYPE_CHECKING:  # more types are accepted than stored: None, a single stop string, lists

        def __init__(
            self,
            *,
            n: int | None = 1,
            temperature: float | None = 1.0,
            top_k: int | None = 0,
            top_p: float | None = 1.0,
            min_p: float | None = 0.0,
            repetition_penalty: float | None = 1.0,
            presence_penalty: float | None = 0.0,
            frequency_penalty: float | None = 0.0,
            seed: int | None = None,
            max_tokens: int | None = None,
            min_tokens: int | None = 0,
            stop: str | list[str] | tuple[str, ...] | None = (),
            stop_token_ids: list[int] | tuple[int, ...] | None = (),
            ignore_eos: bool | None = False,
            logit_bias: dict[int, float] | None = None,
            logprobs: int | None = None,
            structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None,
            prompt_logprobs: int | None = None,
            bad_words: list[str] | tuple[str, ...] | None = (),
            allowed_token_ids: list[int] | tuple[int, ...] | None = None,
            include_stop_str_in_output: bool | None = False,
            skip_special_tokens: bool | None = True,
            spaces_between_special_tokens: bool | None = True,
            detokenize: bool | None = True,
            truncate_prompt_tokens: int | None = None,
        ): ...

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_params(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, neutral_values in NEUTRAL_PARAMS.items():
            if name in fields and not is_neutral(fields[name], neutral_values):
                raise _not_supported(name, fields[name], neutral_values)
        return {
            name: value
            for name, value in fields.items()
            if name not in NEUTRAL_PARAMS
            and (value is not None or name not in cls.model_fields)
            and not (name == "n" and is_neutral(value, (1,)))  # no model has a default: not given
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_strings(cls, value: Any) -> Any:
        value = (value,) if isinstance(value, str) else value
        return _bounded(value, MAX_STOP_STRINGS, "stop strings")

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_token_ids(cls, value: Any) -> Any:
        return _bounded(value, MAX_STOP_TOKEN_IDS, "stop token ids")

    @field_validator("stop")
    @classmethod
    def _stop_string_lengths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("a stop string must not be empty")
        if value and (longest := max(map(len, value))) > MAX_STOP_CHARS:
            raise ValueError(f"a stop string has at most {MAX_STOP_CHARS} characters, not {longest}")
        return value

    @field_validator("allowed_token_ids", mode="before")
    @classmethod
    def _allowed_token_ids(cls, value: Any) -> Any:
        value = _bounded(value, MAX_ALLOWED_TOKEN_IDS, "allowed token ids")
        if value == ():
            raise ValueError("allowed_token_ids must not be empty: no token could be generated")
        return value

    @field_validator("bad_words", mode="before")
    @classmethod
    def _bad_words(cls, value: Any) -> Any:
        return _bounded(value, MAX_BAD_WORDS, "bad words")

    @field_validator("bad_words")
    @classmethod
    def _bad_word_lengths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(map(str.strip, value)):
            raise ValueError("a bad word must have a character that is no space")
        if value and (longest := max(map(len, value))) > MAX_BAD_WORD_CHARS:
            raise ValueError(f"a bad word has at most {MAX_BAD_WORD_CHARS} characters, not {longest}")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _keeps_a_token(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("truncate_prompt_tokens must keep a token, or be -1: no prompt is empty")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _bounded_logit_bias(cls, value):
        if isinstance(value, dict) and len(value) > MAX_LOGIT_BIASES:
            raise ValueError(f"at most {MAX_LOGIT_BIASES} biases, not {len(value)}")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _bias_in_range(cls, value: dict[int, float] | None):
        for token_id, bias in (value or {}).items():
            if token_id < 0 or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias maps token ids to -100..100, not {token_id}: {bias}")
        return value

    @model_validator(mode="after")
    def _min_below_max(self):
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is over max_tokens ({self.max_tokens})")
        return self

    @model_validator(mode="after")
    def _stop_strings_need_text(self):
        if self.stop and not self.detokenize:
            raise ValueError(
                "stop needs the output's text: leave out detokenize=False, or use stop_token_ids"
            )
        return self

    def given(self) -> dict[str, Any]:
        """Return the fields that were given, including those at their default value."""
        given = {
            name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set
        }
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.given()
        return given

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _bounded(value: Any, limit: int, what: str) -> Any:
    """Convert a list to a tuple. Its length is checked before its elements are validated."""
    if isinstance(value, (list, tuple)) and len(value) > limit:
        raise ValueError(f"at most {limit} {what}, not {len(value)}")
    return tuple(value) if isinstance(value, list) else value


def _not_supported(name: str, value: Any, neutral_values: tuple[Any, ...]) -> ValidationError:
    message = f"not supported, only {' or '.join(map(repr, (*neutral_values, None)))} is accepted"
    fault = PydanticCustomError("not_supported", "{message}", {"message": message})
    details = InitErrorDetails(type=fault, loc=(name,), input=value)
    return ValidationError.from_exception_data(SamplingParams.__name__, [details])
