"""One request's output as text, and where and why the output ends."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from ingine.engine.outputs import FinishReason
from ingine.engine.text.detokenizer import Detokenizer, TokenBytes
from ingine.engine.text.stop import StopStrings
from ingine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ingine.engine.text.message_text import MessageText


class OutputText:
    """Turns the output tokens of one request into text, and finds the end of the output.

    The text returned up to a token, and the end, are a pure function of the constructor's arguments and of
    the tokens up to it. So is the assistant message, if there is one. A request is therefore resumed by
    appending its earlier tokens again. Nothing here depends on how tokens are batched or computed.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        max_tokens: int,
        eos_token_ids: frozenset[int] = frozenset(),
        tokenizer: TokenBytes | None = None,
        message_text: "MessageText | None" = None,
    ):
        """max_tokens: the most output tokens that the engine allows; `params.max_tokens` may lower it.
        eos_token_ids: the model's end-of-sequence tokens. tokenizer: without one the text is always "", and
        no stop string is found. message_text: takes the output as an assistant message too.
        """
        self.max_tokens = max_tokens if params.max_tokens is None else min(max_tokens, params.max_tokens)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        """STOP or LENGTH once the output has ended; no token may be appended after that."""
        self.stop_reason: int | str | None = None
        """The stop token or stop string of `params` that ended the output. None for any other end."""
        self._stop_token_ids = frozenset(params.stop_token_ids)
        # A grammar allows an end-of-sequence token that is to be ignored only where it allows nothing else.
        ignores_eos = params.ignore_eos and params.structured_outputs is None
        self.end_token_ids = self._stop_token_ids | (frozenset() if ignores_eos else eos_token_ids)
        """Tokens that end the output."""
        self._min_tokens = params.min_tokens
        self._detokenizer = None
        self.message_text = message_text
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
        self._includes_stop = params.include_stop_str_in_output
        self._stop_strings = StopStrings(params.stop, is_included=self._includes_stop)
        self._num_chars = 0
        """Characters of the text so far. Counted only for a message."""

    def append(self, token_id: int) -> str:
        """Take the next output token. Returns the text that is now certain, and sets `finish_reason` if the
        token ends the output.
        """
        self.num_tokens += 1
        if token_id in self.end_token_ids:
            self._finish(FinishReason.STOP, token_id if token_id in self._stop_token_ids else None)
            # As in vLLM, such a token is in the ids, and in the text only on request.
            return self._detokenize(token_id) if self._includes_stop else ""
        decoded, stop = self._detokenize(token_id), None
        text = decoded
        # The text of the first `min_tokens` tokens is not searched: it may not end the output.
        if self.num_tokens > self._min_tokens:
            text, stop = self._stop_strings.append(decoded)
        if self.message_text is not None:
            self._num_chars += len(text)
            self.message_text.append(token_id, decoded, self._num_chars - self._stop_strings.num_doubtful)
        if stop is not None:
            self._detokenizer = None  # an unfinished character that it holds comes after the end
            if self.message_text is not None:
                self.message_text.cut()
            self._finish(FinishReason.STOP, stop)
        elif self.num_tokens >= self.max_tokens:
            self._finish(FinishReason.LENGTH)
        return text

    def add_token_bytes(self, logprobs: dict) -> None:
        """Add the texts of `SeqOutput.logprobs`, in bytes and decoded, to the logprobs of the next token,
        before it is appended. Adds nothing if the output has no text.
        """
        if self._detokenizer is not None:
            _add_texts(logprobs, self._detokenizer.token_bytes)

    def add_prompt_token_bytes(self, logprobs: dict) -> None:
        """Add the same to the logprobs of a prompt token, before the first output token is appended."""
        if self._detokenizer is not None:
            _add_texts(logprobs, self._detokenizer.token_bytes_inside)

    def flush(self) -> str:
        """Return the text that was held back, once no more tokens come: the start of a stop string, or the
        replacement for an unfinished character. What was held back of the message is then its next delta.
        """
        unfinished = self._detokenizer.flush() if self._detokenizer else ""
        if self.message_text is not None:
            self.message_text.end()
        return self._stop_strings.flush() + unfinished

    def _detokenize(self, token_id: int) -> str:
        return self._detokenizer.append(token_id) if self._detokenizer else ""

    def _finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason


def _add_texts(logprobs: dict, token_bytes: Callable[[int], bytes]) -> None:
    chosen = token_bytes(logprobs["token_id"])
    top = [token_bytes(token_id) for token_id, _ in logprobs["top"]]
    logprobs["bytes"], logprobs["decoded_token"] = list(chosen), chosen.decode(errors="replace")
    logprobs["top_bytes"] = [list(token) for token in top]
    logprobs["top_decoded_tokens"] = [token.decode(errors="replace") for token in top]
