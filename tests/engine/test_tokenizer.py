"""Text and conversations to token ids, from any thread, whatever is in them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from ingine.errors import ConfigError, InvalidRequest
from ingine.tokenizer import Tokenizer
from tests.tiny_models import make_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def test_encode_gives_what_transformers_gives(smollm2):
    theirs = AutoTokenizer.from_pretrained(smollm2.path)
    for text in ("", "Hello  world\n", "1234 and 5.6", "naïve 日本 👩‍👩‍👧", "<|im_start|>user"):
        assert smollm2.tokenizer.encode(text) == theirs(text).input_ids


def test_encode_chat_gives_what_transformers_gives(smollm2):
    theirs = AutoTokenizer.from_pretrained(smollm2.path)
    expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert smollm2.tokenizer.encode_chat(CHAT) == expected


def test_surrogates_do_not_crash(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud83d\ude00b\ud800c")) == "a😀b\ufffdc"
    messages = [{"role": "user", "content": "\ud800"}]
    assert "\ufffd" in tokenizer.decode(tokenizer.encode_chat(messages))


def test_eos_token_ids(tokenizer, smollm2):
    assert tokenizer.decode(tokenizer.eos_token_ids) == ""
    assert len(smollm2.tokenizer.eos_token_ids) == 1


def test_a_prompt_is_never_cut_even_if_the_tokenizer_s_file_says_so(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    file.write_text(json.dumps(content))
    assert len(Tokenizer.from_folder(tmp_path).encode("a" * 100)) == 100


def test_many_threads_at_once(smollm2):
    texts = ["word " * (1 + index % 50) for index in range(400)]
    expected = [smollm2.tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(smollm2.tokenizer.encode, texts)) == expected


def test_a_model_without_a_template_takes_no_chat():
    with pytest.raises(InvalidRequest, match="no chat template") as error:
        Tokenizer(make_tokenizer(chat_template=None)).encode_chat(CHAT)
    assert error.value.code == "no_chat_template"


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "at least one"), ([{"role": "assistant", "content": "Hi"}], "the user speaks first")],
)
def test_messages_that_the_template_refuses(messages, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        Tokenizer(make_tokenizer(chat_template=REFUSING)).encode_chat(messages)
    assert error.value.code == "invalid_messages"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
