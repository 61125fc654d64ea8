"""Turns token ids into text incrementally, at a constant cost for each token."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that a detokenizer needs."""

    def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """The UTF-8 bytes of a token; None for a special or unknown one. `first`: it begins the text."""

    def special_token(self, token_id: int) -> str:
        """The name of a special token; "" for an unknown id."""


class Detokenizer:
    """Decodes one sequence's output. The concatenated deltas and the flush equal the text of all tokens.

    A token consists of bytes, and may end inside a character. The incremental UTF-8 decoder holds an
    unfinished character back, and replaces invalid bytes.
    """

    def __init__(self, tokenizer: TokenBytes):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True

    def append(self, token_id: int) -> str:
        """Take the next token. Returns the text that it completes."""
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        if token is None:
            return ""
        self._first = False  # also if it has no bytes, like a lone space at the beginning of a text
        return self._utf8.decode(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token would add to the text now. For a special token its name, which the text
        does not contain.
        """
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        return self._tokenizer.special_token(token_id).encode() if token is None else token

    def flush(self) -> str:
        """Return the replacement character if an unfinished character is held back, else ""."""
        return self._utf8.decode(b"", final=True)
