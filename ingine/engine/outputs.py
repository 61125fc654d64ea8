"""What comes out: of the engine a step at a time, with its counters; and of `LLM` a request at a time."""

from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the longest sequence the engine can hold."""
    ABORT = "abort"
    """`Engine.abort`."""
    ERROR = "error"
    """The model's logits left nothing to choose from; `stop_reason` says what was wrong."""


@dataclass(slots=True)
class SeqOutput:
    """What one step added to one sequence.

    The text emitted up to a position is a pure function of the sampling parameters and of the output
    tokens up to it, however they were batched or resumed. What is only known at the end is in
    `final_text`.
    """

    seq_id: str
    position: int
    """Output tokens so far, these included."""
    token_ids: list[int]
    """The new ones. Empty where a sequence ends without: aborted, failed, or resumed at its end."""
    text: str
    """What they add to the text. With a stop string it ends before that."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Tokens whose KV the prefix cache had when the sequence was first admitted; resumed output included."""
    logprobs: list[dict] | None = None
    """One a new token: {token_id, logprob, top: [[token_id, logprob], ...], bytes, top_bytes}.

    bytes: the token's UTF-8 bytes, as ints; top_bytes: those of each of `top`. Both are missing where there
    is no tokenizer.
    """
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token's id (None for end of sequence) or the stop string."""
    final_text: str = ""
    """When finished: the text held back until now, a half character or the start of a stop string."""

    def followed_by(self, later: "SeqOutput") -> "SeqOutput":
        """What this step and the sequence's next one added together."""
        has_logprobs = self.logprobs is not None or later.logprobs is not None
        return SeqOutput(
            self.seq_id,
            later.position,
            self.token_ids + later.token_ids,
            self.text + later.text,
            self.num_prompt_tokens,
            self.num_cached_tokens,
            (self.logprobs or []) + (later.logprobs or []) if has_logprobs else None,
            later.finish_reason,
            later.stop_reason,
            later.final_text,
        )


@dataclass(slots=True)
class EngineStats:
    """Gauges now, and totals since the engine was made."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    """Free ones, cached or not."""
    kv_usage: float
    """Share of the blocks in use, 0 to 1."""
    prefix_cache_hit_tokens: int
    prefix_cache_query_tokens: int
    num_preemptions: int
    num_prompt_tokens: int
    """Of the sequences added."""
    num_output_tokens: int
    """Sampled here; tokens that a resumed sequence brought are not in it."""
    num_draft_tokens: int = 0
    """Of speculation."""
    num_accepted_tokens: int = 0
    """Those of them that came to be output."""


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict] | None
    """As in `SeqOutput`, for all tokens."""


@dataclass(slots=True)
class RequestTimings:
    """Seconds since the epoch."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What `LLM.generate` and `LLM.chat` return for each prompt, with vLLM's names."""

    request_id: str
    prompt: str | None
    """None where token ids or a conversation were given."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """One."""
    finished: bool
    num_cached_tokens: int
    usage: dict[str, int]
    """num_prompt_tokens, num_cached_tokens, num_output_tokens."""
    timings: RequestTimings
