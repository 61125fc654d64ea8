"""Which tokens would write a tag in pieces."""

from collections.abc import Iterable, Mapping


class TagSpellings:
    """Tokens that complete a tag, other than the one token that is the tag.

    They are forbidden within reasoning. The text would show a closing tag, from which on it is read as the
    answer, and the grammar would not have begun.
    """

    def __init__(self, tag: bytes, token_id: int, token_bytes: Iterable[bytes]):
        """token_bytes: the bytes of each token of the vocabulary, in order."""
        self._tag = tag
        self._max_tail = len(tag) - 1
        completing: dict[int, list[int]] = {}
        for other_id, text in enumerate(token_bytes):
            if tag[-1] not in text:
                continue
            if tag in text and other_id != token_id:
                completing.setdefault(0, []).append(other_id)
            for num_written in range(1, len(tag)):
                if text.startswith(tag[num_written:]):
                    completing.setdefault(num_written, []).append(other_id)
        self._completing: Mapping[int, list[int]] = completing

    def tail(self, tail: bytes, text: bytes) -> bytes:
        """Return the end of a text that ends with `tail`, and goes on with `text`: as much as may begin a
        tag."""
        return (tail + text)[-self._max_tail :] if self._max_tail else b""

    def completed_by(self, tail: bytes) -> list[int]:
        """The tokens that complete a tag behind a text that ends with `tail`."""
        return [
            token_id
            for num_written, token_ids in self._completing.items()
            if tail.endswith(self._tag[:num_written])
            for token_id in token_ids
        ]
