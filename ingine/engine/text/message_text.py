"""One request's output as an assistant message: its text, and the special tokens that are not in it."""

from collections import deque
from typing import Self

from ingine.engine.message_format import MessageFormat
from ingine.engine.parsers.message_parser import MessageParser, parser_of
from ingine.engine.text.detokenizer import Detokenizer, TokenBytes
from ingine.message import Message, MessageDelta
from ingine.sampling_params import SamplingParams


class MessageText:
    """Gives a parser what is certain of the output, in the order of its tokens.

    Special tokens such as `[TOOL_CALLS]` say what the text is, so the parser reads their names where they
    came. The message is a pure function of the tokens, like the text of `OutputText`: a request is resumed by
    appending its earlier tokens again. A special token ends an unfinished character, as any other text does,
    so nothing of the reasoning gets behind its closing tag, nor text behind the marker of a tool call.

    A stop string cuts the message where it cuts the output's text. Otherwise the message does not depend on
    what that text shows: it is the same with other `skip_special_tokens`, `spaces_between_special_tokens` and
    `include_stop_str_in_output`.
    """

    def __init__(self, parser: MessageParser, tokenizer: TokenBytes):
        self._parser = parser
        self._detokenizer = Detokenizer(tokenizer)
        self._num_shown = 0
        """Characters of the output's text, those included that a stop string may still cut off."""
        self._uncertain: deque[tuple[int, str, bool]] = deque()
        """Tokens of which a stop string may cut off a part: (`_num_shown` with the token, its text in the
        message, whether it is special)."""
        self._certain: list[str] = []
        """Text that the parser has not read yet."""
        self._has_ended = False

    @classmethod
    def of(
        cls, format: MessageFormat | None, index: int, tokenizer: TokenBytes | None, params: SamplingParams
    ) -> Self | None:
        """Begin the message of choice `index`. Returns None if it has none: without a format, or without
        text.
        """
        if format is None or tokenizer is None or not params.detokenize:
            return None
        return cls(parser_of(format, index), tokenizer)

    def append(self, token_id: int, shown: str, num_certain: int) -> None:
        """Take a token that does not end the output. shown: what it adds to the output's text. num_certain:
        the first characters of that text, as many as no stop string can cut off any more.
        """
        text, is_special = self._detokenizer.append_named(token_id)
        self._num_shown += len(shown)
        self._uncertain.append((self._num_shown, text, is_special))
        self._settle(num_certain)

    def cut(self) -> None:
        """Drop what is not certain, and an unfinished character: a stop string has ended the output."""
        self._uncertain.clear()
        self._detokenizer.flush()

    def end(self) -> None:
        """Take all that was held back, once no more tokens come."""
        self._settle(self._num_shown)
        self._certain.append(self._detokenizer.flush())
        self._has_ended = True

    def take_delta(self) -> MessageDelta | None:
        """Return what is new of the message since the last call, None if nothing is. Not to be called again
        once it was called after `end`.
        """
        if not self._certain:
            return None
        text, self._certain = "".join(self._certain), []
        delta = self._parser.feed(text)
        if self._has_ended:
            delta = delta.followed_by(self._parser.flush())
        return delta or None

    def message(self) -> Message:
        """All deltas so far, put together."""
        return self._parser.message()

    def finish_reason(self, reason: str) -> str:
        """OpenAI's, see `MessageParser.finish_reason`."""
        return self._parser.finish_reason(reason)

    def _settle(self, num_certain: int) -> None:
        uncertain = self._uncertain
        while uncertain:
            end, text, is_special = uncertain[0]
            if end <= num_certain:
                uncertain.popleft()
                self._certain.append(text)
                continue
            # A special token is in the message as a whole or not at all.
            num_taken = 0 if is_special else len(text) - (end - num_certain)
            if num_taken > 0:
                self._certain.append(text[:num_taken])
                uncertain[0] = end, text[num_taken:], False
            return
