"""One request's output as an assistant message: its text, and the special tokens that are not in it."""

from collections import deque

from ingine.engine.parsers.message_parser import MessageParser
from ingine.message import Message, MessageDelta


class MessageText:
    """Gives a parser what is certain of the output, in the order of its tokens.

    Special tokens such as `[TOOL_CALLS]` are not in the text, but say what the text is. They are put back
    where they were. The message is a pure function of the tokens, like the text of `OutputText`: a request is
    resumed by appending its earlier tokens again. What a stop string cuts off is not in the message either.
    """

    def __init__(self, parser: MessageParser):
        self._parser = parser
        self._special: deque[tuple[int, str]] = deque()
        """Special tokens behind text that is not certain yet: (characters of the text before it, name)."""
        self._num_decoded = 0
        self._num_certain = 0

    def decoded(self, text: str) -> None:
        """A token has added `text` to the text, of which a stop string may still cut off a part."""
        self._num_decoded += len(text)

    def special(self, name: str) -> None:
        """A special token has come that does not end the output."""
        self._special.append((self._num_decoded, name))

    def append(self, text: str) -> MessageDelta:
        """Take text that is now certain. Returns what it adds to the message."""
        return self._parser.feed(self._with_special_tokens(text))

    def flush(self, text: str) -> MessageDelta:
        """Take the text that was held back, once no more tokens come. Returns what it adds to the message."""
        delta = self._parser.feed(self._with_special_tokens(text))
        return delta.followed_by(self._parser.flush())

    def message(self) -> Message:
        return self._parser.message()

    def finish_reason(self, reason: str) -> str:
        """OpenAI's, see `MessageParser.finish_reason`."""
        return self._parser.finish_reason(reason)

    def _with_special_tokens(self, text: str) -> str:
        """The text with the special tokens before, within and right behind it."""
        start, pieces, done = self._num_certain, [], 0
        self._num_certain += len(text)
        while self._special and self._special[0][0] <= self._num_certain:
            at, name = self._special.popleft()
            pieces += (text[done : at - start], name)
            done = at - start
        pieces.append(text[done:])
        return "".join(pieces)
