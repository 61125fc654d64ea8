"""Turns token ids into text incrementally, at a constant cost for each token."""

import codecs
from typing import Protocol


class TokenBytes(Protocol):
    """The part of a tokenizer that a detokenizer needs."""

    def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """The UTF-8 bytes of a token; None for a special or unknown one. `first`: it begins the text."""

    def special_token(self, token_id: int) -> str:
        """The name of a special token; "" for an unknown id."""

    def special_token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """The UTF-8 bytes of a special token in a text that shows such tokens; None for another token."""


class Detokenizer:
    """Decodes one sequence's output. The concatenated deltas and the flush equal the text of all tokens.

    A token consists of bytes, and may end inside a character. The incremental UTF-8 decoder holds an
    unfinished character back, and replaces invalid bytes.
    """

    def __init__(
        self,
        tokenizer: TokenBytes,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):
        """The options are vLLM's, see `SamplingParams`."""
        self._tokenizer = tokenizer
        self._skips_special_tokens = skip_special_tokens
        self._has_spaces = spaces_between_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        self._is_after_special = False

    def append(self, token_id: int) -> str:
        """Take the next token. Returns the text that it completes."""
        token, self._is_after_special = self._bytes_and_kind(token_id)
        if token is None:
            return ""
        self._first = False  # also if it has no bytes, like a lone space at the beginning of a text
        return self._utf8.decode(token)

    def append_named(self, token_id: int) -> tuple[str, bool]:
        """Take the next token. Returns the text that it completes, and False; or the name of a special token,
        behind the replacement for a character that it leaves unfinished, and True.
        """
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        if token is None:
            return self.flush() + self._tokenizer.special_token(token_id), True
        self._first = False
        return self._utf8.decode(token), False

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token would add to the text now. For a special token that the text does not
        contain, its name.
        """
        token, _ = self._bytes_and_kind(token_id)
        return self._tokenizer.special_token(token_id).encode() if token is None else token

    def token_bytes_inside(self, token_id: int) -> bytes:
        """The bytes that this token adds to a text that it does not begin. For a special token its name."""
        token = self._tokenizer.token_bytes(token_id, first=False)
        return self._tokenizer.special_token(token_id).encode() if token is None else token

    def flush(self) -> str:
        """Return the replacement character if an unfinished character is held back, else ""."""
        return self._utf8.decode(b"", final=True)

    def _bytes_and_kind(self, token_id: int) -> tuple[bytes | None, bool]:
        """The bytes that this token adds to the text, None if it adds nothing; and whether it is a special
        token that the text shows.
        """
        token = self._tokenizer.token_bytes(token_id, first=self._first)
        if token is not None or self._skips_special_tokens:
            return token, False
        token = self._tokenizer.special_token_bytes(token_id, first=self._first)
        if token is not None and self._is_after_special and not self._has_spaces:
            token = self._tokenizer.special_token(token_id).encode()
        return token, token is not None
