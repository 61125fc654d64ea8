"""Token ids in, text out, at a constant cost a token."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """The UTF-8 bytes of a token, None for a special one. `first`: it begins the text."""

    def special_token(self, token_id: int) -> str:
        """The name of a special token, "" for an id that is no token's."""


class Detokenizer:
    """One sequence's output as text. The deltas and the flush, put together, are the decoded whole.

    A token is bytes, and need not end where a character does; the incremental UTF-8 decoder holds an
    unfinished character back, and replaces what can never become one.
    """

    def __init__(self, tokenizer: TokenBytes):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def append(self, token_id: int) -> str:
        """The text that is complete with this token."""
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        if token is None:
            return ""
        self._first = False  # also where nothing is left of it, as of a lone space that begins a text
        return self._utf8.decode(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What this token would add to the text now; of a special one its name, which is not in the text."""
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        return self._tokenizer.special_token(token_id).encode() if token is None else token

    def flush(self) -> str:
        """The replacement character for what is held back, if anything is."""
        return self._utf8.decode(b"", final=True)
