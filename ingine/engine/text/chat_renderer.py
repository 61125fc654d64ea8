"""Renders a conversation as a prompt in which each control token comes from the chat template."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from tokenizers import AddedToken

from ingine.engine.text.chat_messages import ChatMessages
from ingine.engine.text.chat_template import ChatTemplate
from ingine.engine.text.control_tokens import ControlTokens
from ingine.engine.text.conversation import ChatPrompt, Conversation
from ingine.engine.text.surrogates import without_surrogates
from ingine.errors import ErrorCode, InvalidRequest

MAX_REASON_CHARS = 500
"""The most characters of a template's error message that are reported; its text may have any length."""


class ChatRenderer:
    """It can be used from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], added_tokens: Iterable[AddedToken]):
        """source: the chat template.
        special_tokens: variables of the template by role, such as {"bos_token": "<s>"}.
        added_tokens: all of the tokenizer's, which need not be special.
        """
        self._template = ChatTemplate(source, special_tokens)
        self._messages = ChatMessages(self._template)
        self._added_tokens = tuple(added_tokens)

    def render(self, conversation: Conversation, now: datetime, max_chars: int | None = None) -> ChatPrompt:
        """now: the current time, for templates that write the date.

        Raises InvalidRequest: INVALID_MESSAGES with the template's error message, or PROMPT_TOO_LONG as
        soon as the text has more than `max_chars` characters.
        """
        if not conversation.messages:
            raise InvalidRequest(ErrorCode.INVALID_MESSAGES, "a conversation has at least one message")
        try:
            return self._render(conversation, now, max_chars)
        except (InvalidRequest, MemoryError):
            raise
        # A template is a program by the model's author, and may raise any exception. It means that the
        # template cannot render these messages, not that the engine failed.
        except Exception as error:
            raise InvalidRequest(
                ErrorCode.INVALID_MESSAGES,
                f"the model's chat template refuses these messages: {error!s:.{MAX_REASON_CHARS}}",
            ) from None

    def _render(self, conversation: Conversation, now: datetime, max_chars: int | None) -> ChatPrompt:
        written = _as_text(
            [
                self._messages.prepare(conversation.messages),
                conversation.tools and list(conversation.tools),
                dict(conversation.template_kwargs),
            ]
        )
        messages, tools, variables = json.loads(written)
        marks = None
        if not conversation.allow_special_tokens:
            marks = self._control_tokens.marks(written + self._template.source)
            messages = marks.mark_messages(messages)
            tools, variables = marks.mark(tools), marks.mark(variables)
        text = self._template.render(
            messages,
            now,
            tools=tools,
            variables=variables,
            add_generation_prompt=conversation.add_generation_prompt,
            continue_final_message=conversation.continue_final_message,
            max_chars=max_chars,
        )
        return ChatPrompt(text) if marks is None else marks.prompt(text)

    @cached_property
    def _control_tokens(self) -> ControlTokens:
        """Special tokens, and other added ones that the template names, but for white space."""
        literals = self._template.literals
        return ControlTokens(
            special=[token.content for token in self._added_tokens if token.special],
            in_template=[
                token.content
                for token in self._added_tokens
                if token.content in literals and not token.content.isspace()
            ],
        )


def _as_text(value: Any) -> str:
    return without_surrogates(json.dumps(value, ensure_ascii=False))
