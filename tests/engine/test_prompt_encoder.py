"""Prompts that are meant to be costly: what is known to be too long is refused for little work."""

from datetime import UTC, datetime

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from ingine.engine.text.conversation import ChatPrompt, Conversation
from ingine.engine.text.prompt_encoder import PromptEncoder
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from tests.tiny_models import make_tokenizer

MAX_NUM_TOKENS = 100
BACKTRACKS = r"(?:\p{L}|\p{L}\p{L})+\d"
"""Tries each way to cut n letters that no digit follows, 2^n, until the library gives up: it panics."""
PANICS = "a" * 60 + "!"


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.longest_token = tokenizer.longest_token
        self.num_chars = self.num_rendered = 0

    def encode(self, text: str) -> list[int]:
        self.num_chars += len(text)
        return self._tokenizer.encode(text)

    def encode_rendered(self, text: str, stand_ins: dict[str, str]) -> list[int]:
        self.num_chars += len(text)
        return self._tokenizer.encode_rendered(text, stand_ins)

    def render(self, messages, **options) -> ChatPrompt:
        self.num_rendered += len(Conversation.of(messages).messages)
        return self._tokenizer.render(messages, **options)


@pytest.fixture
def counting() -> Counting:
    return Counting(Tokenizer.from_transformers(make_tokenizer()))


@pytest.fixture
def encoder(counting) -> PromptEncoder:
    return PromptEncoder(counting, MAX_NUM_TOKENS)


def too_long(encode, *args) -> None:
    with pytest.raises(InvalidRequest) as raised:
        encode(*args)
    assert raised.value.code is ErrorCode.PROMPT_TOO_LONG


def test_a_text_that_no_tokens_can_have_is_not_looked_at(encoder, counting):
    longest = len("<|endoftext|>")
    too_long(encoder.encode, "1" * (MAX_NUM_TOKENS * longest + 1))
    assert counting.num_chars == 0
    text = "<|endoftext|>" * (MAX_NUM_TOKENS - 1)
    assert len(encoder.encode(text)) == MAX_NUM_TOKENS - 1


def test_a_text_of_far_too_many_tokens_is_looked_at_in_part(encoder, counting):
    too_long(encoder.encode, "1" * (MAX_NUM_TOKENS * 13))
    assert counting.num_chars <= 8 * MAX_NUM_TOKENS


@pytest.mark.parametrize("text", ["hello", "1" * 300, "<|im_end|>" * 99], ids=["short", "long", "special"])
def test_what_may_be_short_enough_is_tokenised_as_ever(encoder, counting, text):
    """Though it be a little too long: the engine says by how much."""
    assert encoder.encode(text) == counting.encode(text)


def test_as_many_messages_as_tokens_are_refused_before_the_template_sees_them(encoder, counting):
    too_long(encoder.encode_chat, [{"role": "user", "content": ""}] * 50_000)
    too_long(encoder.encode_chat, [{"role": "user", "content": "1" * 5000}])
    assert counting.num_rendered == 0
    assert len(encoder.encode_chat([{"role": "user", "content": "1"}])) > 3


def test_a_template_that_writes_without_end_is_stopped():
    written = []
    template = "{% for i in range(9999) %}{{ raise_if_late() }}{{ 'x' * 100 }}{% endfor %}"
    tokenizer = Tokenizer.from_transformers(make_tokenizer(template))
    environment = tokenizer._chats["default"]._template._compiled.environment
    environment.globals["raise_if_late"] = lambda: written.append(1) or ""
    tokenizer._chats["default"]._template._compiled = environment.from_string(template)
    too_long(PromptEncoder(tokenizer, MAX_NUM_TOKENS).encode_chat, [{"role": "user", "content": "x"}])
    assert len(written) <= MAX_NUM_TOKENS


def test_what_a_template_says_of_messages_is_cut():
    tokenizer = Tokenizer.from_transformers(make_tokenizer("{{ raise_exception('x' * 99999) }}"))
    with pytest.raises(InvalidRequest, match="xxx") as raised:
        tokenizer.render([{"role": "user", "content": ""}])
    assert len(str(raised.value)) < 1000


def test_another_process_can_have_the_same_tokenizer():
    ours = Tokenizer.from_transformers(make_tokenizer())
    theirs = Tokenizer.from_definition(ours.definition())
    text, now = "1 <|im_end|> é日本\n", datetime(2024, 2, 29, tzinfo=UTC)
    assert theirs.encode(text) == ours.encode(text)
    chat = [{"role": "user", "content": text}]
    assert theirs.encode_chat(chat, now=now) == ours.encode_chat(chat, now=now)
    assert theirs.eos_token_ids == ours.eos_token_ids


# ------------------------------------------------------------------------ tokenizers that are programs


def with_parts(**parts):
    """The core of a tokenizer with other steps."""
    core = make_tokenizer().backend_tokenizer
    for name, part in parts.items():
        setattr(core, name, part)
    return core


def split_by(pattern: str):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(use_regex=False),
    ])  # fmt: skip


DOUBLE = normalizers.Sequence([normalizers.Replace("a", "aa")])
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("parts", "is_linear"),
    [
        ({}, True),
        ({"pre_tokenizer": pre_tokenizers.Digits()}, True),
        ({"pre_tokenizer": split_by(LLAMA3)}, True),
        ({"pre_tokenizer": split_by(BACKTRACKS)}, False),
        ({"normalizer": normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])}, True),
        ({"normalizer": normalizers.Sequence([normalizers.NFC(), DOUBLE])}, False),
        ({"normalizer": normalizers.Replace(Regex("b+"), "")}, False),
        ({"normalizer": normalizers.Prepend("▁")}, True),
        ({"normalizer": normalizers.Prepend("▁" * 1000)}, False),
        ({"model": models.WordPiece({"[UNK]": 0, "a": 1}, max_input_chars_per_word=10**9)}, False),
    ],
    ids=[
        *("byte level", "digits", "llama3", "backtracks", "replaces", "doubles", "replaces by pattern"),
        *("prepends", "prepends much", "word pieces"),
    ],
)
def test_whose_time_is_known_to_be_in_proportion_to_the_text(parts, is_linear):
    assert Tokenizer(with_parts(**parts)).takes_linear_time is is_linear


def test_a_panic_of_the_tokenizer_is_an_error():
    """pyo3's PanicException is no Exception: it would end the event loop."""
    core = with_parts(pre_tokenizer=split_by(BACKTRACKS))
    with pytest.raises(BaseException, match="retry-limit") as raised:
        core.encode(PANICS)
    assert not isinstance(raised.value, Exception)
    with pytest.raises(RuntimeError, match="retry-limit"):
        Tokenizer(core).encode(PANICS)


def test_a_panic_of_the_decoder_is_an_error():
    core = with_parts(decoder=decoders.Replace(Regex(BACKTRACKS), ""))
    core.add_tokens([PANICS])
    tokenizer, token_id = Tokenizer(core), core.token_to_id(PANICS)
    with pytest.raises(RuntimeError, match="retry-limit"):
        tokenizer.decode([token_id])
    with pytest.raises(RuntimeError, match="retry-limit"):
        tokenizer.token_bytes(token_id, first=True)
