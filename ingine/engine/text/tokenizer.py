"""A model's own tokenizer and chat template. They can be used from several threads."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tokenizers import Tokenizer as CoreTokenizer

from ingine.engine.text.chat_renderer import ChatRenderer
from ingine.engine.text.conversation import ChatPrompt, Conversation, Messages
from ingine.engine.text.linear_time import takes_linear_time
from ingine.engine.text.panics import panics_as_errors
from ingine.engine.text.surrogates import without_surrogates
from ingine.engine.text.tokenizer_files import (
    VOCABULARIES,
    ChatTemplates,
    checked_copies,
    read_tokenizer_files,
)
from ingine.errors import ConfigError, ErrorCode, IngineError, InvalidRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Definition = tuple[str, dict[str, str], ChatTemplates]
"""(tokenizer.json as one string, special tokens by role, chat templates)."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Tokenizer:
    """Wraps a tokenizer of the `tokenizers` library, which encodes without locks and state."""

    def __init__(
        self,
        core: CoreTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplates = None,
    ):
        """special_tokens: by role, such as {"bos_token": "<s>"}; each of them is a token of `core`."""
        self._core = core
        # A tokenizer.json may have these from training. A prompt must never be truncated silently.
        core.no_truncation()
        core.no_padding()
        self._special_tokens = dict(special_tokens or {})
        self._chat_templates = chat_template
        self._added_tokens = core.get_added_tokens_decoder()
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template or {}
        self._chats = {
            name: ChatRenderer(source, self._special_tokens, self._added_tokens.values())
            for name, source in named.items()
            if name in ("default", "tool_use")
        }
        eos_token = self._special_tokens.get("eos_token")
        eos_token_id = None if eos_token is None else core.token_to_id(eos_token)
        self.eos_token_ids = frozenset() if eos_token_id is None else frozenset({eos_token_id})
        self._special_ids = {token_id for token_id, token in self._added_tokens.items() if token.special}
        self._is_byte_level = _has_byte_level_decoder(core)
        if not (anchor := self._encode("a", add_special_tokens=False)):
            raise ConfigError("the tokenizer has no token for the letter a: its vocabulary is damaged")
        self._anchor = anchor[-1]
        self._token_bytes: dict[tuple[int, bool], bytes | None] = {}

    @classmethod
    def from_folder(cls, path: Path) -> Self:
        """Load the tokenizer in a folder. Raises ConfigError if there is none, or if it cannot be used or is
        not a fast one.
        """
        try:
            with panics_as_errors():
                return cls._from_folder(path)
        except IngineError:
            raise
        except Exception as error:  # the libraries raise exceptions of many types
            raise ConfigError(f"no usable tokenizer in {path}: {error}") from error

    @classmethod
    def _from_folder(cls, path: Path) -> Self:
        if (files := read_tokenizer_files(path)) is not None:
            return cls(files.core, special_tokens=files.special_tokens, chat_template=files.chat_template)
        if not _has_vocabulary(path):
            raise ConfigError(f"no usable tokenizer in {path}: there is no tokenizer.json")
        from transformers import AutoTokenizer

        with checked_copies(path) as copies:
            tokenizer = AutoTokenizer.from_pretrained(copies, trust_remote_code=False, local_files_only=True)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(f"the tokenizer in {path} is not a fast one (it has no tokenizer.json)")
        return cls.from_transformers(tokenizer)

    @classmethod
    def from_transformers(cls, tokenizer: "PreTrainedTokenizerFast") -> Self:
        return cls(
            tokenizer.backend_tokenizer,
            special_tokens=tokenizer.special_tokens_map,
            chat_template=tokenizer.chat_template,
        )

    def definition(self) -> Definition:
        """Everything that another process needs to build the same tokenizer, see `from_definition`."""
        return self._core.to_str(), self._special_tokens, self._chat_templates

    @classmethod
    def from_definition(cls, definition: Definition) -> Self:
        core, special_tokens, chat_template = definition
        return cls(CoreTokenizer.from_str(core), special_tokens=special_tokens, chat_template=chat_template)

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered. Some models have a template only for those with tools."""
        return bool(self._chats)

    @property
    def chat_template(self) -> str | None:
        """The sources of all chat templates, one behind the other. None if the model has none."""
        templates = self._chat_templates
        return "\n".join(templates.values()) if isinstance(templates, Mapping) else templates

    @property
    def added_texts(self) -> dict[int, str]:
        """The text of each token that is a whole text, special or not, by its id."""
        return {token_id: token.content for token_id, token in self._added_tokens.items()}

    @property
    def num_tokens(self) -> int:
        """Tokens of the vocabulary, the added ones among them."""
        return self._core.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """The most characters of a text that one token can stand for."""
        return max(map(len, self._core.get_vocab(with_added_tokens=True)))

    @cached_property
    def takes_linear_time(self) -> bool:
        """Whether `encode` is known to take time in proportion to a text's length, whatever the text."""
        return takes_linear_time(self._core)

    def encode(self, text: str) -> list[int]:
        """Return token ids, with the special tokens that the model's tokenizer adds to a prompt."""
        return self._encode(text, add_special_tokens=True)

    def encode_word(self, text: str) -> list[int]:
        """Return token ids of a part of a text, without the special tokens that begin or end a prompt."""
        return self._encode(text, add_special_tokens=False)

    def encode_chat(self, messages: Messages, *, now: datetime | None = None) -> list[int]:
        """Return the token ids of the conversation in the model's chat template.

        Raises InvalidRequest as `render` does.
        """
        prompt = self.render(messages, now=now)
        return self.encode_rendered(prompt.text, prompt.stand_ins)

    def encode_rendered(self, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Return the token ids of the text of a `ChatPrompt`, or of a part of it. The text already contains
        the special tokens.

        Raises InvalidRequest (INVALID_MESSAGES) if the tokenizer cannot tell a text from a control token.
        """
        if not any(char in text for char in stand_ins):
            return self._encode(text, add_special_tokens=False)
        text = without_surrogates(text)
        with panics_as_errors():
            encoding = self._core.encode(text, add_special_tokens=False)
        return self._without_stand_ins(encoding, text, stand_ins)

    def _without_stand_ins(self, encoding, text: str, stand_ins: Mapping[str, str]) -> list[int]:
        """Put the tokens of the character that each stand-in stands for in the place of its own."""
        places = {at: stand_ins[char] for at, char in enumerate(text) if char in stand_ins}
        token_ids: list[int] = []
        replaced = -1
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if start == replaced:
                continue  # the next byte of the stand-in
            if start in places and end == start + 1:
                token_ids += self._ids_of_char(places.pop(start))
                replaced = start
            else:
                token_ids.append(token_id)
        if places:
            raise _inseparable()
        return token_ids

    def _ids_of_char(self, char: str) -> list[int]:
        """The tokens of a character, or of its bytes, as they are within a text."""
        written = char.encode()
        names = [_CHAR_OF_BYTE[byte] for byte in written] if self._is_byte_level else [char]
        token_ids = [self._core.token_to_id(name) for name in names]
        if None in token_ids:
            token_ids = [self._core.token_to_id(f"<0x{byte:02X}>") for byte in written]
        if None in token_ids:
            raise _inseparable()
        return token_ids

    def render(
        self,
        messages: Messages,
        *,
        now: datetime | None = None,
        max_chars: int | None = None,
    ) -> ChatPrompt:
        """Render the conversation with the model's chat template.

        now: the current time for templates that write the date. None is the actual time, in UTC.

        Raises InvalidRequest: NO_CHAT_TEMPLATE; INVALID_MESSAGES with the template's error message; or
        PROMPT_TOO_LONG as soon as the text has more than `max_chars` characters.
        """
        conversation = Conversation.of(messages)
        chat = self._chats.get("default")
        if conversation.tools is not None:
            chat = self._chats.get("tool_use", chat)
        if chat is None:
            raise InvalidRequest(
                ErrorCode.NO_CHAT_TEMPLATE, "this model has no chat template: send a prompt, not messages"
            )
        return chat.render(conversation, now or datetime.now(UTC), max_chars)

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with panics_as_errors():
            return self._core.encode(without_surrogates(text), add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of all tokens together, without special tokens."""
        with panics_as_errors():
            return self._core.decode(list(token_ids), skip_special_tokens=True)

    def token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """Return the UTF-8 bytes that a token adds to a text; None for a special or unknown token. `first`:
        the token begins the text.

        Concatenated, they are the bytes of `decode`, except that a decoder with byte fallback (as Llama 2 and
        Mistral have it) replaces a whole run of byte tokens if one of them is invalid.
        """
        key = (token_id, first)
        if key not in self._token_bytes:
            with panics_as_errors():
                self._token_bytes[key] = self._compute_token_bytes(token_id, first)
        return self._token_bytes[key]

    def special_token(self, token_id: int) -> str:
        """Return the name of a special token; "" for an unknown id."""
        with panics_as_errors():
            return self._core.id_to_token(token_id) or ""

    def control_token_id(self, name: str) -> int | None:
        """Return the id of a token that is no text in a grammar: a special one, or an added one of the form
        <...>. None for any other name.
        """
        token_id = self._core.token_to_id(name)
        added = self._added_tokens.get(token_id)
        is_tag = name.startswith("<") and name.endswith(">")
        return token_id if added is not None and (added.special or is_tag) else None

    def special_token_bytes(self, token_id: int, *, first: bool) -> bytes | None:
        """Return the UTF-8 bytes that a special token adds to a text which shows special tokens; None for any
        other token. `first`: as in `token_bytes`.
        """
        if token_id not in self._special_ids:
            return None
        if self._is_byte_level:
            return self.special_token(token_id).encode()
        with panics_as_errors():
            if first:
                return self._core.decode([token_id], skip_special_tokens=False).encode()
            before = self._core.decode([self._anchor])
            whole = self._core.decode([self._anchor, token_id], skip_special_tokens=False)
            return whole.removeprefix(before).encode()

    def _compute_token_bytes(self, token_id: int, first: bool) -> bytes | None:
        token = self._core.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return None
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()  # an added token is its own text
        if (byte := _BYTE_TOKEN.fullmatch(token)) and byte[1] >= "80":  # below that it is a whole character
            return bytes.fromhex(byte[1])
        if first:
            return self._core.decode([token_id]).encode()
        return (
            self._core.decode([self._anchor, token_id])
            .removeprefix(self._core.decode([self._anchor]))
            .encode()
        )


def _inseparable() -> InvalidRequest:
    return InvalidRequest(
        ErrorCode.INVALID_MESSAGES,
        "the messages' text has a control token in it, which this tokenizer cannot encode as text: leave it "
        "out, or set allow_special_tokens",
    )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """Load the tokenizer in a model's folder. Returns None, with a warning, if there is none.

    Raises ConfigError for a tokenizer that cannot be used.
    """
    if _has_vocabulary(folder):
        return Tokenizer.from_folder(folder)
    logger.warning("no tokenizer.json in %s: prompts must be token ids, and outputs have no text", folder)
    return None


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    """Return `tokenizer`. Raises InvalidRequest if it is None, because the request needs text."""
    if tokenizer is None:
        raise InvalidRequest(
            ErrorCode.INVALID_PARAMETER,
            "this model has no tokenizer (no tokenizer.json in its folder): send token ids, not text",
        )
    return tokenizer


def _has_vocabulary(folder: Path) -> bool:
    return any(next(Path(folder).glob(pattern), None) for pattern in VOCABULARIES)


def _has_byte_level_decoder(core) -> bool:
    decoder = json.loads(core.decoder.__getstate__()) if core.decoder else {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's byte alphabet: printable Latin-1 characters stand for their own bytes, and the
    characters from U+0100 on for the other bytes, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
_CHAR_OF_BYTE = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
