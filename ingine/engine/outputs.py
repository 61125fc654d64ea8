"""What the engine returns for each step, what `LLM` returns for each request, and the engine's statistics."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ingine.errors import ErrorCode
from ingine.message import Message, MessageDelta, joined


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    TOOL_CALLS = "tool_calls"
    """As STOP, where the output is a message in which the model has chosen to call functions."""
    LENGTH = "length"
    """`max_tokens`, or the length of the longest sequence that the engine can hold."""
    ABORT = "abort"
    """`Engine.abort`."""
    ERROR = "error"
    """No token can be chosen: the model's logits are not finite, or the request's grammar or its other
    parameters forbid every token. `SeqOutput.error_code` says which, and `stop_reason` is the error
    message."""

    @property
    def is_complete(self) -> bool:
        """Whether the output has ended by itself: nothing was cut off from outside."""
        return self in (FinishReason.STOP, FinishReason.TOOL_CALLS, FinishReason.LENGTH)


@dataclass(slots=True)
class SeqOutput:
    """The tokens and text that one step added to one sequence.

    The text returned up to a position is a pure function of the sampling parameters and of the output tokens
    up to it, however they were batched or resumed. Text that only becomes certain because the sequence has
    ended is in `final_text`.
    """

    seq_id: str
    position: int
    """The number of the sequence's output tokens so far, including these."""
    token_ids: list[int]
    """The new tokens. Empty if the sequence ends without one: aborted, failed, or resumed at its end."""
    text: str
    """The text that is certain with these tokens and was not before. It ends before a stop string."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Tokens whose KV the prefix cache had when the sequence was first admitted, resumed output included."""
    logprobs: list[dict] | None = None
    """One for each new token: {token_id, logprob, rank, top: [[token_id, logprob], ...], bytes,
    decoded_token, top_bytes, top_decoded_tokens}.

    `rank` is the number of tokens that are at least as likely: 1 for the likeliest. `bytes` are the token's
    UTF-8 bytes as ints, `decoded_token` is the same as text, with U+FFFD for half a character; `top_bytes`
    and `top_decoded_tokens` are those of each token of `top`. These four are missing if the output has no
    text: the model has no tokenizer, or the request has detokenize=False.
    """
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string, or the id of the request's stop token; None for an end-of-sequence token. The error
    message if `finish_reason` is ERROR."""
    final_text: str = ""
    """Once finished, the text that was held back: an unfinished character or the start of a stop string."""
    error_code: ErrorCode | None = None
    """The kind of error if `finish_reason` is ERROR."""
    index: int = 0
    """The choice that the sequence is, from 0 to n - 1."""
    others_run: bool = False
    """Once finished: whether other choices of the request have not finished yet."""
    prompt_logprobs: list[dict | None] | None = None
    """With the first output token of choice 0, if requested: an entry as in `logprobs` for each prompt token,
    None for the first one. A resumed choice 0 that has output tokens already does not repeat them."""
    delta: MessageDelta | None = None
    """What `text` adds to the assistant message, if `EngineRequest.message` asks for one. None: nothing."""
    final_delta: MessageDelta | None = None
    """Once finished, what was held back of the message. All deltas put together are the message."""
    message: Message | None = None
    """The whole message, once the output has ended by itself: with STOP, TOOL_CALLS or LENGTH."""

    @property
    def ends_request(self) -> bool:
        """Whether this is the last output of its request."""
        return self.finish_reason is not None and not self.others_run

    def followed_by(self, later: "SeqOutput") -> "SeqOutput":
        """Merge this output with the sequence's next one, as if one step had made both."""
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
            later.error_code,
            later.index,
            later.others_run,
            later.prompt_logprobs if self.prompt_logprobs is None else self.prompt_logprobs,
            joined(self.delta, later.delta),
            later.final_delta,
            later.message,
        )


@dataclass(slots=True)
class EngineStats:
    """Current gauges, and totals since the engine was built."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    """Blocks that no sequence uses, whether or not they hold a cached prefix."""
    kv_usage: float
    """The share of the blocks that sequences use, 0 to 1."""
    prefix_cache_hit_tokens: int
    prefix_cache_query_tokens: int
    num_preemptions: int
    num_prompt_tokens: int
    """Prompt tokens of the sequences that were added."""
    num_output_tokens: int
    """Tokens sampled by this engine. The earlier output of a resumed sequence does not count."""
    num_draft_tokens: int = 0
    """Tokens that speculation drafted. Those that grammars force are drafts too, and not counted: they cannot
    be wrong."""
    num_accepted_tokens: int = 0
    """Of these, the tokens that became output."""
    num_compiling: int = 0
    """Those of `num_waiting` whose grammars are being compiled. They wait for no room."""


@dataclass(slots=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    logprobs: list[dict] | None
    """The entries of `SeqOutput.logprobs`, for all tokens."""
    cumulative_logprob: float | None = None
    """The sum of the tokens' log probabilities, if they were requested."""
    message: dict[str, Any] | None = None
    """The reply of `LLM.chat` as OpenAI's assistant message: {role, content, reasoning, tool_calls}. None for
    `LLM.generate`, with detokenize=False, and if the output has failed."""

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestTimings:
    """When a request reached each stage, in seconds since the epoch."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """The result of `LLM.generate` and `LLM.chat` for one prompt. Fields are named as in vLLM."""

    request_id: str
    prompt: str | None
    """None if the prompt was given as token ids or as a conversation."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    """One for each choice, in the order of their indices."""
    finished: bool
    num_cached_tokens: int
    usage: dict[str, int]
    """Keys: num_prompt_tokens, num_cached_tokens, num_output_tokens. The last counts all choices."""
    timings: RequestTimings
    prompt_logprobs: list[dict | None] | None = None
    """If requested, an entry of `SeqOutput.logprobs` for each prompt token, None for the first one."""

    @property
    def metrics(self) -> RequestTimings:
        """vLLM's name of `timings`."""
        return self.timings
