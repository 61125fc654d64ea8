"""Validates requests against an engine's limits, and fills in the model's sampling defaults.

The caller validates each request once before it reaches an engine: `LLM` does, and the worker at admission.
`Engine.add` does not. This module imports no torch, so a process that runs its engine in another process can
validate requests without loading torch.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import MAX_CHOICES, MAX_PROMPT_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one engine. They do not change during its lifetime."""

    max_model_len: int
    """The config's `max_model_len`, or the model's maximum length if the config has none."""
    num_kv_tokens: int
    """The number of tokens that all KV blocks together hold."""
    vocab_size: int
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    """The model's own defaults, see `ingine.engine.store.generation_config`."""
    has_text: bool = True
    """Whether the model has a tokenizer. Without one no stop string can be found."""
    eos_token_ids: list[int] = field(default_factory=list)
    """The model's end-of-sequence tokens."""
    max_choices: int = MAX_CHOICES
    """The config's `max_choices`."""

    @property
    def max_num_tokens(self) -> int:
        """The most tokens of one sequence, prompt and output together."""
        return min(self.max_model_len, self.num_kv_tokens)

    def with_defaults(self, params: SamplingParams) -> SamplingParams:
        """Return `params` with the model's own default for each field that was not given.

        Given fields take precedence: a default `max_tokens` that is lower than a given `min_tokens` is
        dropped.
        """
        given = params.given()
        missing = {name: value for name, value in self.sampling_defaults.items() if name not in given}
        if params.min_tokens > missing.get("max_tokens", params.min_tokens):
            del missing["max_tokens"]
        return params.model_copy(update=missing) if missing else params

    def num_kept_prompt_tokens(self, params: SamplingParams) -> int | None:
        """Return how many of a prompt's last tokens `truncate_prompt_tokens` keeps; None: it keeps all.

        A `max_tokens` over the model's length means no limit, so -1 leaves room for one output token then.
        The memory for KV does not count: a request that goes on elsewhere needs the same prompt there.
        """
        kept = params.truncate_prompt_tokens
        if kept != -1:
            return kept
        max_tokens = params.max_tokens or 1
        return self.max_model_len - (max_tokens if max_tokens < self.max_model_len else 1)

    def truncate(self, prompt_token_ids: Tokens[int], params: SamplingParams) -> Tokens[int]:
        """Return the tokens of a prompt that `truncate_prompt_tokens` keeps."""
        kept = self.num_kept_prompt_tokens(params) if isinstance(params, SamplingParams) else None
        return prompt_token_ids if kept is None else prompt_token_ids[-kept:]

    def validate(
        self, prompt_token_ids: Tokens[int], params: SamplingParams, *, resumes: bool = False
    ) -> None:
        """Raise InvalidRequest if this engine can never run the request, or is not to.

        resumes: an engine has generated a part of the output. `max_choices` limits what is begun, and such a
        request can go on: its choices take turns where there is no room for all.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(
                ErrorCode.INVALID_TYPE, f"params must be SamplingParams, not {type(params).__name__}"
            )
        if params.stop and not self.has_text:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                "stop: this model has no tokenizer, so its output has no text; use stop_token_ids",
            )
        if params.structured_outputs is not None and not self.has_text:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                "structured_outputs: this model has no tokenizer, so its output has no text",
            )
        if params.n > self.max_choices and not resumes:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                f"n: {params.n} is over max_choices, which is {self.max_choices}",
            )
        if params.bad_words and not self.has_text:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                "bad_words: this model has no tokenizer; use logit_bias or allowed_token_ids",
            )
        self.validate_length(len(prompt_token_ids))
        self.validate_token_ids(prompt_token_ids, "the prompt", ErrorCode.INVALID_TOKEN_ID)
        num_reported = len(prompt_token_ids) * (1 + (params.prompt_logprobs or 0))
        if params.prompt_logprobs is not None and num_reported > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                f"prompt_logprobs: {num_reported} for this prompt, the most is {MAX_PROMPT_LOGPROBS}",
            )
        self.validate_token_ids(params.stop_token_ids, "stop_token_ids", ErrorCode.INVALID_PARAMETER)
        self.validate_token_ids(
            params.allowed_token_ids or (), "allowed_token_ids", ErrorCode.INVALID_PARAMETER
        )
        self.validate_token_ids(params.logit_bias or (), "logit_bias", ErrorCode.INVALID_PARAMETER)

    def validate_output(self, output_token_ids: Tokens[int]) -> None:
        """Raise InvalidRequest if this engine cannot continue after the output of an earlier attempt."""
        self.validate_token_ids(output_token_ids, "the output so far", ErrorCode.INVALID_TOKEN_ID)

    def validate_length(self, num_tokens: int) -> None:
        """Raise InvalidRequest unless a prompt may have `num_tokens` tokens."""
        if num_tokens == 0:
            raise InvalidRequest(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")
        if num_tokens >= self.max_num_tokens:
            raise InvalidRequest(
                ErrorCode.PROMPT_TOO_LONG,
                f"the prompt has {num_tokens} tokens; the most is {self.max_num_tokens - 1} "
                f"(max_model_len is {self.max_model_len}, all KV blocks hold {self.num_kv_tokens})",
            )

    def validate_token_ids(self, token_ids: Iterable[int], where: str, code: ErrorCode) -> None:
        """Raise InvalidRequest unless all ids are in the vocabulary. The error has `code`, and its message
        begins with `where`.
        """
        try:
            ids = array("q", token_ids)  # rejects anything but ints, in C
        except (TypeError, OverflowError) as error:
            raise InvalidRequest(code, f"{where}: token ids must be ints ({error})") from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequest(
                code, f"{where}: {wrong} is not a token id; the vocabulary has {self.vocab_size} tokens"
            )
