"""Text and conversations to token ids, from any thread, whatever is in them."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from ingine.errors import ConfigError, InvalidRequest
from ingine.tokenizer import Tokenizer
from tests.tiny_models import make_tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_transformers(make_tokenizer())


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
        Tokenizer.from_transformers(make_tokenizer(chat_template=None)).encode_chat(CHAT)
    assert error.value.code == "no_chat_template"


DATED = (
    "\n  {% macro today() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}"
    '{% if strftime_now is defined %}{{ today() }}, {{ strftime_now("%Y-%m-%d") }}{% endif %}'
)


def test_a_template_s_date_is_the_given_one_else_the_present():
    tokenizer = Tokenizer.from_transformers(make_tokenizer(chat_template=DATED))
    token_ids = tokenizer.encode_chat(CHAT, now=datetime(2024, 2, 29, 23, 59, tzinfo=UTC))
    assert tokenizer.decode(token_ids).split() == ["29", "Feb", "2024,", "2024-02-29"]

    before, token_ids, after = datetime.now(UTC), tokenizer.encode_chat(CHAT), datetime.now(UTC)
    assert tokenizer.decode(token_ids).endswith((f"{before:%Y-%m-%d}", f"{after:%Y-%m-%d}"))


def test_a_template_with_a_date_gives_what_transformers_gives():
    """To the last space."""
    for template in ("\n  {% if true %}a{% endif %}", "  {{- 'a' }}\n", "{#- b #}\n a"):
        core = make_tokenizer(chat_template=template + " {{ strftime_now('%Y')[:2] }}\n")
        expected = core.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert Tokenizer.from_transformers(core).encode_chat(CHAT) == expected


def test_the_template_s_beginning_of_sequence_is_the_only_one():
    core = make_tokenizer(chat_template="<|im_start|>{{ messages[0].content }}")
    core.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A",
        special_tokens=[("<|im_start|>", core.convert_tokens_to_ids("<|im_start|>"))],
    )
    tokenizer = Tokenizer.from_transformers(core)
    assert tokenizer.encode_chat(CHAT) == tokenizer.encode("Hi")
    assert len(tokenizer.encode("Hi")) == 3


REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"


@pytest.mark.parametrize(
    ("messages", "says"),
    [([], "at least one"), ([{"role": "assistant", "content": "Hi"}], "the user speaks first")],
)
def test_messages_that_the_template_refuses(messages, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        Tokenizer.from_transformers(make_tokenizer(chat_template=REFUSING)).encode_chat(messages)
    assert error.value.code == "invalid_messages"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
