"""How one sequence is sampled. Shared by the engine, the wire and the offline API; imports no torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024


class SamplingParams(BaseModel):
    """Sampling parameters with vLLM's names and meanings.

    The token at output position p is drawn with one uniform number that depends on (seed, p) alone, so a
    request that is batched differently, preempted or resumed elsewhere draws the same tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy.")
    top_k: int = Field(0, ge=-1, description="Keep the k likeliest tokens; 0 or -1 keeps all.")
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens below min_p times the likeliest one's.")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Over prompt and output tokens.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Over output tokens.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Over output tokens, per occurrence.")
    seed: int | None = Field(None, ge=0, lt=2**63, description="None: drawn when the request is added.")
    max_tokens: int = Field(256, ge=1)
    min_tokens: int = Field(0, ge=0, description="No end of sequence before this many output tokens.")
    stop: tuple[str, ...] = Field(
        (), fail_fast=True, description="Strings that end the output; not part of its text."
    )
    stop_token_ids: tuple[TokenId, ...] = Field((), fail_fast=True)
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Report the chosen token's logprob and this many top ones."
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, value):
        if isinstance(value, str):
            return (value,)
        return tuple(value) if isinstance(value, list) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _list_or_tuple(cls, value):
        return tuple(value) if isinstance(value, list) else value

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings, not {len(value)}")
        if "" in value:
            raise ValueError("a stop string must not be empty")
        return value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _not_too_many(cls, value):
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
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is over max_tokens ({self.max_tokens})")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0
