"""What is refused before an engine gets it, and what is assumed where a request is silent.

Whoever makes a request validates it here, once: `LLM`, and the worker at admission. `Engine.add` does not.
Imports no torch: who runs an engine in another process validates requests without loading one.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams


@dataclass(frozen=True)
class RequestLimits:
    """Numbers of one engine, which do not change while it lives."""

    max_model_len: int
    """As the config has it, or the model."""
    num_kv_tokens: int
    """What all KV blocks together hold."""
    vocab_size: int
    sampling_defaults: dict[str, Any] = field(default_factory=dict)
    """The model's own, see `ingine.engine.store.generation_config`."""
    has_text: bool = True
    """Whether the model has a tokenizer: without, no stop string can be found."""

    @property
    def max_num_tokens(self) -> int:
        """Most tokens of one sequence, prompt and output together."""
        return min(self.max_model_len, self.num_kv_tokens)

    def with_defaults(self, params: SamplingParams) -> SamplingParams:
        """`params` with the model's own value for each field that was not given.

        What is given wins: with `min_tokens` over the model's own `max_tokens`, that default is dropped.
        """
        given = params.given()
        missing = {name: value for name, value in self.sampling_defaults.items() if name not in given}
        if params.min_tokens > missing.get("max_tokens", params.min_tokens):
            del missing["max_tokens"]
        return params.model_copy(update=missing) if missing else params

    def validate(self, prompt_token_ids: Tokens[int], params: SamplingParams) -> None:
        """Raises InvalidRequest for what this engine can never run."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequest(
                ErrorCode.INVALID_TYPE, f"params are SamplingParams, not {type(params).__name__}"
            )
        if params.stop and not self.has_text:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER,
                "stop: this model has no tokenizer, so its output has no text; use stop_token_ids",
            )
        self.validate_length(len(prompt_token_ids))
        self.validate_token_ids(prompt_token_ids, "the prompt", ErrorCode.INVALID_TOKEN_ID)
        self.validate_token_ids(params.stop_token_ids, "stop_token_ids", ErrorCode.INVALID_PARAMETER)
        self.validate_token_ids(params.logit_bias or (), "logit_bias", ErrorCode.INVALID_PARAMETER)

    def validate_output(self, output_token_ids: Tokens[int]) -> None:
        """Raises InvalidRequest for output of an earlier life that this engine cannot go on after."""
        self.validate_token_ids(output_token_ids, "the output so far", ErrorCode.INVALID_TOKEN_ID)

    def validate_length(self, num_tokens: int) -> None:
        """Raises InvalidRequest for a prompt of so many tokens, whichever they are."""
        if num_tokens == 0:
            raise InvalidRequest(ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")
        if num_tokens >= self.max_num_tokens:
            raise InvalidRequest(
                ErrorCode.PROMPT_TOO_LONG,
                f"the prompt has {num_tokens} tokens; the most is {self.max_num_tokens - 1} "
                f"(max_model_len is {self.max_model_len}, all KV blocks hold {self.num_kv_tokens})",
            )

    def validate_token_ids(self, token_ids: Iterable[int], where: str, code: ErrorCode) -> None:
        """Raises InvalidRequest with `code`, and `where` in its message, unless all are of the vocabulary."""
        try:
            ids = array("q", token_ids)  # refuses what is no int, in C
        except (TypeError, OverflowError) as error:
            raise InvalidRequest(code, f"{where}: token ids are ints ({error})") from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequest(
                code, f"{where}: {wrong} is no token id, the vocabulary has {self.vocab_size}"
            )
