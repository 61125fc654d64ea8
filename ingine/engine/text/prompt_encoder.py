"""Encodes a text or a conversation, and stops as soon as it is known to be too long."""

from collections.abc import Callable
from datetime import datetime

from ingine.engine.text.conversation import ChatPrompt, Conversation, Messages
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest

FEWEST_CHARS_PER_TOKEN = 8
"""More than usual texts have. If a text has more for each allowed token, a part of it is encoded first."""


MAX_UNTRUNCATED_TOKENS = 8 << 20
"""More tokens than the largest job has bytes."""


class PromptEncoder:
    """Encodes prompts for an engine whose sequences have at most `max_num_tokens` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_num_tokens: int):
        self.tokenizer = tokenizer
        self.max_num_tokens = max_num_tokens
        self.max_chars = max_num_tokens * tokenizer.longest_token
        """The most characters that `max_num_tokens` tokens can stand for."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Raises InvalidRequest (PROMPT_TOO_LONG)."""
        self.check_length(len(text))
        return self._encode(text, self.tokenizer.encode)

    def encode_chat(self, messages: Messages, *, now: datetime | None = None) -> list[int]:
        """Return the token ids of a conversation in the model's chat template.

        Raises InvalidRequest: PROMPT_TOO_LONG, or the errors of `Tokenizer.render` and `encode_rendered`.
        """
        return self.encode_rendered(self.render(messages, now=now))

    def render(self, messages: Messages, *, now: datetime | None = None) -> ChatPrompt:
        """Render a conversation. Raises as `encode_chat` does."""
        conversation = Conversation.of(messages)
        self.check_chat(len(conversation.messages), conversation.num_chars)
        return self.tokenizer.render(conversation, now=now, max_chars=self.max_chars)

    def encode_rendered(self, prompt: ChatPrompt) -> list[int]:
        """Return the token ids of a rendered conversation. Raises as `encode_chat` does."""
        return self._encode(prompt.text, lambda text: self.tokenizer.encode_rendered(text, prompt.stand_ins))

    def untruncated(self) -> "PromptEncoder":
        """Return an encoder for prompts of which only the last tokens are kept: it refuses none for its
        length.
        """
        return PromptEncoder(self.tokenizer, MAX_UNTRUNCATED_TOKENS)

    def check_length(self, num_chars: int) -> None:
        """Raise InvalidRequest for a text that is too long whatever its content."""
        if num_chars > self.max_chars:
            raise self._too_long(f"{num_chars} characters; the most is {self.max_chars}")

    def check_chat(self, num_messages: int, num_chars: int) -> None:
        """Raise InvalidRequest for a conversation that is too long whatever the template makes of it."""
        if num_messages >= self.max_num_tokens:
            raise self._too_long(f"{num_messages} messages, each of which is at least one token")
        self.check_length(num_chars)

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode `text`. A part of it is enough to reject a text that is far too long, so that this costs no
        more than the longest allowed text.

        A part that ends inside a word may have a few more tokens than within the whole text, so it counts as
        too long only if it has twice as many tokens as are allowed.
        """
        num_chars = FEWEST_CHARS_PER_TOKEN * self.max_num_tokens
        while num_chars < len(text):
            if len(encode(text[:num_chars])) >= 2 * self.max_num_tokens:
                raise self._too_long(f"over {2 * self.max_num_tokens} tokens")
            num_chars *= 4
        return encode(text)

    def _too_long(self, has: str) -> InvalidRequest:
        return InvalidRequest(
            ErrorCode.PROMPT_TOO_LONG,
            f"the prompt has {has}; the most tokens of a prompt are {self.max_num_tokens - 1}",
        )
