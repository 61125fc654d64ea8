"""Text and conversations to token ids, from any thread, whatever is in them."""

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, Qwen2Tokenizer

from ingine.engine.text.conversation import Conversation
from ingine.engine.text.tokenizer import Tokenizer
from ingine.engine.text.tokenizer_files import read_tokenizer_files
from ingine.errors import ConfigError, InvalidRequest
from tests.tiny_models import CHAT_TEMPLATE, make_tokenizer

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


TEXTS = (
    "",
    "Hello  world\n",
    "it's 1234 and 5.6",
    "naïve 日本 👩‍👩‍👧",
    "<|im_start|>user a<|im_end|>",
    " a\n\n b",
    "e\u0301",
)


def byte_vocab(*more: str) -> dict[str, int]:
    return {token: index for index, token in enumerate([*make_tokenizer().get_vocab(), *more])}


def sentencepiece_like() -> LlamaTokenizer:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[("▁", "a"), ("a", "b")], chat_template=CHAT_TEMPLATE)


CLASSES = {
    "generic": make_tokenizer,
    "generic without a template": lambda: make_tokenizer(None),
    "qwen2": lambda: Qwen2Tokenizer(
        vocab=byte_vocab(), merges=[], eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ),
    "gpt2": lambda: GPT2Tokenizer(
        vocab=byte_vocab("Ġa"), merges=[("Ġ", "a")], eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    ),
    "llama": sentencepiece_like,
}


@pytest.mark.parametrize("make", CLASSES.values(), ids=CLASSES)
def test_a_folder_gives_what_transformers_makes_of_it(make, tmp_path):
    make().save_pretrained(tmp_path)
    assert_as_transformers(tmp_path)
    assert read_tokenizer_files(tmp_path) is not None


def assert_as_transformers(folder) -> None:
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        token_ids = theirs(text).input_ids
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids) == theirs.backend_tokenizer.decode(token_ids)
    assert ours.eos_token_ids == {theirs.eos_token_id}
    if theirs.chat_template:
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(CHAT) == expected


def edit_config(folder, **changes) -> None:
    """None takes a key out."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


TEMPLATE_A, TEMPLATE_B = ("{{ bos_token }}a{{ eos_token }}", "b{{ messages[0].content }}")


@pytest.mark.parametrize(
    ("in_config", "in_file", "says"),
    [
        (TEMPLATE_A, None, "a"),
        (TEMPLATE_A, TEMPLATE_B, "bHi"),
        (
            [{"name": "tool_use", "template": TEMPLATE_B}, {"name": "default", "template": TEMPLATE_A}],
            None,
            "a",
        ),
    ],
)
def test_where_a_folder_has_its_chat_template(in_config, in_file, says, tmp_path):
    make_tokenizer(in_file).save_pretrained(tmp_path)
    edit_config(tmp_path, chat_template=in_config)
    assert_as_transformers(tmp_path)
    ours = Tokenizer.from_folder(tmp_path)
    assert ours.decode(ours.encode_chat(CHAT)) == says


def test_a_conversation_with_tools_has_a_template_of_its_own(tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path)
    named = [{"name": "tool_use", "template": TEMPLATE_B}, {"name": "default", "template": TEMPLATE_A}]
    edit_config(tmp_path, chat_template=named)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    from_folder = Tokenizer.from_folder(tmp_path)
    ours = [
        from_folder,
        Tokenizer.from_transformers(theirs),
        Tokenizer.from_definition(from_folder.definition()),
    ]
    for tools in (None, [], [{"type": "function", "function": {"name": "f"}}]):
        expected = theirs.apply_chat_template(CHAT, tools=tools, tokenize=False, add_generation_prompt=True)
        for tokenizer in ours:
            assert tokenizer.render(Conversation(CHAT, tools)).plain == expected


def test_templates_without_a_default_are_none(tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path)
    edit_config(tmp_path, chat_template=[{"name": "tool_use", "template": TEMPLATE_B}])
    for tokenizer in (
        Tokenizer.from_folder(tmp_path),
        Tokenizer.from_transformers(AutoTokenizer.from_pretrained(tmp_path)),
    ):
        with pytest.raises(InvalidRequest, match="no chat template"):
            tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}},
        {"bos_token": "<|im_start|>", "add_bos_token": True},
        {"tool_token": "<|im_end|>", "chat_template": "{{ tool_token }}"},
        {"extra_special_tokens": {"tool_token": "<|im_end|>"}, "chat_template": "{{ tool_token }}"},
        {"extra_special_tokens": ["<|im_start|>"]},
        {"model_max_length": 4, "clean_up_tokenization_spaces": True, "add_prefix_space": True},
    ],
    ids=str,
)
def test_what_a_tokenizer_s_config_says_counts(changes, tmp_path):
    make_tokenizer(None).save_pretrained(tmp_path)
    edit_config(tmp_path, **{"chat_template": TEMPLATE_A, **changes})
    assert_as_transformers(tmp_path)
    assert read_tokenizer_files(tmp_path) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token": "<|the end|>"},
        {"extra_special_tokens": ["<|new|>"]},
        {"added_tokens_decoder": {"259": {"content": "<|new|>", "special": True}}},
        {"split_special_tokens": True},
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": None},
    ],
    ids=str,
)
def test_transformers_is_asked_where_its_classes_change_the_tokenizer(changes, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    assert read_tokenizer_files(tmp_path) is None
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "a<|new|>b<|the end|>"):
        assert ours.encode(text) == theirs(text).input_ids
    assert ours.eos_token_ids == {theirs.eos_token_id}


@pytest.mark.parametrize(
    ("made_by", "changes"),
    [
        ("llama", {"add_prefix_space": False}),
        ("gpt2", {"add_prefix_space": True}),
        ("qwen2", {"add_prefix_space": True}),
        ("llama", {"legacy": True}),
        ("llama", {"tokenizer_class": "GemmaTokenizer"}),
        ("generic", {"tokenizer_class": None}),
        ("llama", {"tokenizer_class": ["LlamaTokenizer"]}),
    ],
    ids=str,
)
def test_transformers_is_asked_where_a_class_would_cut_text_in_another_way(made_by, changes, tmp_path):
    CLASSES[made_by]().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    assert read_tokenizer_files(tmp_path) is None


@pytest.mark.parametrize(
    ("made_by", "changes"),
    [
        ("llama", {"add_prefix_space": False}),
        ("llama", {"tokenizer_class": "LlamaTokenizerFast"}),
        ("llama", {"tokenizer_class": "GemmaTokenizer"}),
        ("gpt2", {"add_prefix_space": True}),
        ("gpt2", {"add_prefix_space": False}),
        ("qwen2", {"add_prefix_space": True}),
    ],
    ids=str,
)
def test_a_class_gives_what_transformers_makes_of_it(made_by, changes, tmp_path):
    CLASSES[made_by]().save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "<s>a"):
        assert ours.encode(text) == theirs(text).input_ids


def test_a_file_of_llama_2_is_left_to_its_class(tmp_path):
    sentencepiece_like().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    prepend, replace = {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "content": "▁"}
    content["normalizer"] = {
        "type": "Sequence",
        "normalizers": [prepend, replace | {"pattern": {"String": " "}}],
    }
    file.write_text(json.dumps(content | {"pre_tokenizer": None}))
    ours, theirs = Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a</s>a") == theirs("a</s>a").input_ids


@pytest.mark.parametrize(
    "config", ['{"added_tokens_decoder": [1]}', '{"eos_token": {"x": 1}}', '{"eos_token": [[]]}']
)
def test_what_is_wrong_with_a_value_is_transformers_to_say(config, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(config)
    assert read_tokenizer_files(tmp_path) is None


@pytest.mark.parametrize("config", [b"{", b"[1]", b"[]", b"\xff"], ids=repr)
def test_a_config_that_is_no_json_object_is_named(config, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_damaged_folder_is_a_config_error(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, added_tokens_decoder=[1])
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
    edit_config(tmp_path, added_tokens_decoder=None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_special_tokens_in_a_file_of_their_own(tmp_path):
    """transformers 4 wrote such files."""
    make_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, eos_token=None, pad_token=None)
    eos_token = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos_token}))
    assert_as_transformers(tmp_path)
    assert read_tokenizer_files(tmp_path).special_tokens == {"eos_token": "<|im_end|>"}


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
    """The text is equal to the last space."""
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


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 10 ** 400 * 1.5 }}", "too large"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'x'.encode('no such') }}", "unknown encoding"),
    ],
)
def test_a_template_that_fails_on_messages_refuses_them(template, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        Tokenizer.from_transformers(make_tokenizer(chat_template=template)).encode_chat(CHAT)
    assert error.value.code == "invalid_messages"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_of_the_tokenizers_library_is_a_damaged_tokenizer(tmp_path):
    """It is no Exception, and would end a worker's event loop."""
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"] |= {
        "continuing_subword_prefix": "####",
        "vocab": {"a": 0, "b": 1},
        "merges": [["a", "b"]],
    }
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        Tokenizer.from_folder(tmp_path)
