"""How an output is read follows from the model, the conversation, and the end of the prompt."""

import pytest

from ingine.engine.message_format import NamedFunction
from ingine.engine.parsers.choice import ModelFormats, formats_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.message_request import message_format
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import InvalidRequest
from tests.engine.chat_families import FAMILIES, byte_level, sentencepiece

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER = {"type": "function", "function": {"name": "g"}}
ASKED = [{"role": "user", "content": "Is it <think> or [THINK]?"}]
HERMES, THINKING = ModelFormats("hermes", None), ModelFormats("hermes", "think")
PLAIN = Tokenizer.from_transformers(byte_level("{{ messages[-1].content }}"))


def of(formats: ModelFormats, tools=None, tool_choice=None, tokenizer: Tokenizer = PLAIN, **options):
    conversation = Conversation(options.pop("messages", ASKED), tools, **options)
    prompt = tokenizer.encode_chat(conversation)
    return message_format(formats, conversation, prompt, tokenizer, tool_choice=tool_choice, key="job")


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("choice", [None, "auto", "none"])
def test_without_tools_or_reasoning_there_is_no_format(tools, choice):
    assert of(HERMES, tools, choice) is None
    assert of(HERMES, [TOOL], "none") is None


@pytest.mark.parametrize(
    ("given", "choice"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "g"}}, NamedFunction("g")),
    ],
)
@pytest.mark.parametrize("formats", [HERMES, THINKING])
def test_tools_may_be_called(formats, given, choice):
    found = of(formats, [TOOL, OTHER], given)
    assert (found.tool_format, found.functions) == ("hermes", {"f": {"type": "object"}, "g": {}})
    assert (found.tool_choice, found.key) == (choice, "job")
    assert found.reasoning == (REASONING_TAGS["think"] if formats.reasoning else None)
    assert not found.starts_in_reasoning


@pytest.mark.parametrize("tools", [None, [TOOL], [{"name": "of another kind"}]])
def test_reasoning_is_read_without_tools_too(tools):
    found = of(THINKING, tools, "none")
    assert (found.tool_format, found.functions, found.tool_choice) == (None, {}, "none")
    assert found.reasoning == REASONING_TAGS["think"]


@pytest.mark.parametrize(
    ("tools", "choice", "says"),
    [
        ([{"name": "f"}], None, "a tool is"),
        (["f"], None, "a tool is"),
        ([{"function": {"name": 1}}], None, "a tool is"),
        ([{"function": {"name": "f", "parameters": ["a"]}}], "auto", "a tool is"),
        ([TOOL], "any", "tool_choice is"),
        ([TOOL], {"type": "function", "function": {"name": "g"}}, "tool_choice is"),
        ([TOOL], {"function": {"name": ["f"]}}, "tool_choice is"),
        ([TOOL], ["f"], "tool_choice is"),
        (None, "required", "tool_choice is"),
        (None, {"type": "function", "function": {"name": "f"}}, "tool_choice is"),
    ],
)
def test_what_is_not_openais_is_refused(tools, choice, says):
    with pytest.raises(InvalidRequest, match=says):
        of(HERMES, tools, choice)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_the_prompt_of_each_family_says_whether_reasoning_has_begun(family, make):
    tokenizer = Tokenizer.from_transformers(make(FAMILIES[family]))
    formats = formats_of("llama", tokenizer.chat_template)
    found = of(formats, tokenizer=tokenizer)
    assert (found is not None) == (formats.reasoning is not None)
    if found is not None:
        prompt = tokenizer.render(ASKED).plain
        assert found.starts_in_reasoning == prompt.rstrip().endswith("<think>")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize(
    ("end", "has_begun"),
    [
        ("<think>", True),
        ("x<think>\n\n  \n", True),
        ("<think>\n\n</think>\n\n", False),
        ("<think>\nWell", False),
        ("[THINK]", False),
        ("é<think>", True),
        ("   ", False),
    ],
)
def test_the_end_of_the_prompt_counts(make, end, has_begun):
    tokenizer = Tokenizer.from_transformers(make("{{ messages[-1].content }}"))
    messages = [{"role": "user", "content": end}]
    found = of(THINKING, tokenizer=tokenizer, messages=messages, allow_special_tokens=True)
    assert found.starts_in_reasoning == has_begun


@pytest.mark.parametrize(
    ("content", "has_begun"),
    [
        ("<think>\nWell", True),
        ([{"type": "text", "text": "<think>"}, {"type": "text", "text": "Well"}], True),
        ("<think>hm</think>So", False),
        ("So", False),
    ],
)
def test_a_message_that_goes_on_may_have_begun_to_reason(content, has_begun):
    tokenizer = Tokenizer.from_transformers(byte_level(FAMILIES["qwen2.5"]))
    messages = [*ASKED, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert of(THINKING, tokenizer=tokenizer, messages=messages, **options).starts_in_reasoning == has_begun


def test_all_templates_of_a_model_show_its_formats():
    named = byte_level("x")
    tokenizer = Tokenizer(
        named.backend_tokenizer, chat_template={"default": "{{ '</think>' }}", "tool_use": "<tool_call>"}
    )
    assert formats_of("llama", tokenizer.chat_template) == THINKING
    assert PLAIN.chat_template == "{{ messages[-1].content }}"
    assert Tokenizer(named.backend_tokenizer).chat_template is None
