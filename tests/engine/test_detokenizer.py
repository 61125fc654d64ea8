"""Incremental text: its pieces are the decoded whole, and none of them ends in half a character."""

import random

import pytest
from tokenizers import Tokenizer as CoreTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ingine.engine.text.detokenizer import Detokenizer
from ingine.engine.text.tokenizer import Tokenizer
from tests.tiny_models import make_tokenizer

TEXTS = (
    "Plain words, and  spaces\n\n\tof all kinds.",
    "Grüße, naïve café — “quotes” … №",
    "日本語と中文 и русский हिन्दी",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301",
)


@pytest.fixture(scope="module", params=["tiny", "smollm2"])
def tokenizer(request) -> Tokenizer:
    if request.param == "tiny":
        return Tokenizer.from_transformers(make_tokenizer())
    return request.getfixturevalue("smollm2").tokenizer


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    """One a token, and the flush."""
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.append(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_and_no_piece_has_half_a_character(tokenizer, text):
    parts = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)


@pytest.mark.parametrize("seed", range(100))
def test_any_tokens_at_all_give_what_decoding_them_together_gives(tokenizer, seed):
    """The first tokens are the special ones and the bytes: mostly invalid UTF-8. SmolLM2 has 49152 in all."""
    rng = random.Random(seed)
    token_ids = [rng.randrange(rng.choice((259, 49152))) for _ in range(200)]
    assert "".join(pieces(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_a_character_comes_with_its_last_byte():
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    assert pieces(tokenizer, tokenizer.encode("aé")) == ["a", "", "é", ""]


def test_half_a_character_at_the_end_is_flushed_as_a_replacement():
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    assert pieces(tokenizer, tokenizer.encode("é")[:1]) == ["", "\ufffd"]


def test_special_and_unknown_tokens_have_no_text():
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    im_start = tokenizer.encode("<|im_start|>")
    assert len(im_start) == 1
    assert "".join(pieces(tokenizer, [*im_start, *tokenizer.encode("a"), 10**6])) == "a"


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """The kind that Llama 2 and Mistral have: a word begins with ▁, and what has no token is bytes."""
    words = ["▁Hello", "▁world", "!", "▁", "a"]
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    vocab |= {word: 258 + index for index, word in enumerate(words)}
    core = CoreTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<s>", "<unk>"])
    return Tokenizer.from_transformers(PreTrainedTokenizerFast(tokenizer_object=core))


def test_with_byte_fallback_the_first_space_goes_and_bytes_make_characters(byte_fallback):
    hello, world, bang = 258, 259, 260
    grin = [byte + 2 for byte in "😀".encode()]
    token_ids = [1, hello, world, *grin, bang, world]
    parts = pieces(byte_fallback, token_ids)
    assert parts == ["", "Hello", " world", "", "", "", "😀", "!", " world", ""]
    assert "".join(parts) == byte_fallback.decode(token_ids)


@pytest.mark.parametrize("seed", range(30))
def test_with_byte_fallback_only_the_very_first_space_goes(byte_fallback, seed):
    """Whatever the text begins with: words, lone spaces, spaces as bytes, special tokens in between."""
    rng = random.Random(seed)
    space, *words = 261, 258, 259, 260, 262, 0x20 + 2, 0x41 + 2
    token_ids = [rng.choice((0, 1, space, *words)) for _ in range(4)]
    assert "".join(pieces(byte_fallback, token_ids)) == byte_fallback.decode(token_ids)


def test_a_lone_space_at_the_start_leaves_the_next_word_its_own(byte_fallback):
    space, hello = 261, 258
    assert pieces(byte_fallback, [space, hello]) == ["", " Hello", ""]


# ---------------------------------------------------------------------- special tokens in the text


def shown(tokenizer: Tokenizer, token_ids: list[int], **options) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, **options)
    return "".join(map(detokenizer.append, token_ids)) + detokenizer.flush()


@pytest.mark.parametrize("seed", range(30))
def test_shown_special_tokens_are_where_decoding_all_tokens_together_has_them(byte_fallback, seed):
    rng = random.Random(seed)
    space, *words = 261, 258, 259, 260, 262, 0x20 + 2, 0x41 + 2
    token_ids = [rng.choice((0, 1, space, *words)) for _ in range(5)]
    whole = byte_fallback._core.decode(token_ids, skip_special_tokens=False)
    assert shown(byte_fallback, token_ids) == whole


def test_shown_special_tokens_of_a_byte_level_tokenizer(tokenizer):
    token_ids = tokenizer.encode("<|im_start|>a é<|im_end|><|im_start|>") + tokenizer.encode("𓃰")[:1]
    whole = tokenizer._core.decode(token_ids, skip_special_tokens=False)
    assert shown(tokenizer, token_ids) == whole == "<|im_start|>a é<|im_end|><|im_start|>\ufffd"
    assert shown(tokenizer, token_ids, spaces_between_special_tokens=False) == whole
    assert shown(tokenizer, [*token_ids, 10**6]) == whole


def test_spaces_between_special_tokens_are_left_out_on_request():
    """A WordPiece decoder puts a space before every word, and a special token is one."""
    core = CoreTokenizer(models.WordLevel({"a": 0, "<x>": 1, "<y>": 2}, unk_token="a"))
    core.decoder = decoders.WordPiece(cleanup=False)
    core.add_special_tokens(["<x>", "<y>"])
    tokenizer = Tokenizer(core)
    token_ids = [1, 2, 0, 1, 1]
    assert shown(tokenizer, token_ids) == "<x> <y> a <x> <x>"
    assert shown(tokenizer, token_ids) == core.decode(token_ids, skip_special_tokens=False)
    assert shown(tokenizer, token_ids, spaces_between_special_tokens=False) == "<x><y> a <x><x>"
