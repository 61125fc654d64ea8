"""Conversations with tools, parts and all else become the prompts that transformers makes of them."""

import copy
import json
from datetime import UTC, datetime

import pytest

from ingine.engine.text.chat_messages import ChatMessages
from ingine.engine.text.chat_template import ChatTemplate
from ingine.engine.text.conversation import Conversation, open_reasoning
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from tests.engine.chat_families import (
    FAMILIES,
    READ_PARTS,
    WRITE_ARGUMENTS_AS_TEXT,
    byte_level,
    legacy_sentencepiece,
    sentencepiece,
)

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "  What is 2 < 3 & 'so' in Paris?\n"}
ARGUMENTS = {"city": 'Pa"ris é', "days": 2, "deep": {"list": [1, None, True]}}


def call(name: str, arguments: dict | str, number: int = 1) -> dict:
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", ARGUMENTS)]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"sun": true}'}
ANSWER = {"role": "assistant", "content": "True."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather <of> a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "enum": ["é", "b"]}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {
        "function": {"parameters": {"type": "object", "properties": {}}, "description": "", "name": "now"},
        "type": "function",
    },
]
CONCATENATES = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
"""As SmolLM2's, which knows no tools."""
PARTS = [{"type": "text", "text": "Look"}, {"type": "text", "text": " here"}]

CONVERSATIONS = {
    "a question": Conversation([QUESTION]),
    "turns": Conversation([SYSTEM, QUESTION, ANSWER, QUESTION]),
    "tools": Conversation([SYSTEM, QUESTION], TOOLS),
    "a call": Conversation([QUESTION, CALLS, RESULT], TOOLS),
    "a call, no tools": Conversation([QUESTION, CALLS | {"content": "I look."}, RESULT]),
    "a call, answered": Conversation([SYSTEM, QUESTION, CALLS, RESULT, ANSWER, QUESTION], TOOLS),
    "two calls": Conversation(
        [QUESTION, CALLS | {"tool_calls": [call("now", {}), call("now", {}, 2)]}, RESULT, RESULT], TOOLS
    ),
    "arguments are no object": Conversation([QUESTION, CALLS | {"tool_calls": [call("now", "[1")]}], TOOLS),
    "keys without a value": Conversation(
        [QUESTION | {"name": None, "tool_calls": None}, ANSWER | {"tool_calls": None}, QUESTION]
    ),
    "reasoning": Conversation([QUESTION, ANSWER | {"reasoning": "Hm."}, RESULT]),
    "reasoning within": Conversation([QUESTION, {"role": "assistant", "content": "<think>a</think>b"}]),
    "developer": Conversation([{"role": "developer", "content": "Be brief."}, QUESTION]),
    "variables": Conversation(
        [QUESTION], template_kwargs={"enable_thinking": False, "date_string": "1 Jan", "documents": []}
    ),
    "a special token replaced": Conversation([QUESTION], template_kwargs={"bos_token": "start"}),
    "no generation prompt": Conversation([QUESTION, ANSWER], add_generation_prompt=False),
    "continued": Conversation([QUESTION, ANSWER], add_generation_prompt=False, continue_final_message=True),
    "continued, with space at the end": Conversation(
        [QUESTION, {"role": "assistant", "content": "True \n"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "continued from nothing": Conversation(
        [QUESTION, CALLS], add_generation_prompt=False, continue_final_message=True
    ),
    "continued and begun": Conversation([QUESTION, ANSWER], continue_final_message=True),
}
NOW = datetime.now(UTC)


def for_transformers(conversation: Conversation, family: str) -> list[dict]:
    """What a user of transformers writes for this family."""
    messages = copy.deepcopy(list(conversation.messages))
    for message in messages:
        for each in message.get("tool_calls") or ():
            arguments = each["function"]["arguments"]
            if family not in WRITE_ARGUMENTS_AS_TEXT and arguments != "[1":
                each["function"]["arguments"] = json.loads(arguments)
    return messages


def theirs(conversation: Conversation, family: str, tokenizer, **options):
    return tokenizer.apply_chat_template(
        for_transformers(conversation, family),
        tools=conversation.tools,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        **conversation.template_kwargs,
        **options,
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_that_of_transformers(family, name):
    conversation = CONVERSATIONS[name]
    tokenizer = byte_level(FAMILIES[family])
    try:
        expected = theirs(conversation, family, tokenizer, tokenize=False)
    except Exception:
        with pytest.raises(InvalidRequest) as refusal:
            Tokenizer.from_transformers(tokenizer).render(conversation, now=NOW)
        assert refusal.value.code == ErrorCode.INVALID_MESSAGES
        return
    assert Tokenizer.from_transformers(tokenizer).render(conversation, now=NOW).plain == expected


@pytest.mark.parametrize("make", [byte_level, sentencepiece, legacy_sentencepiece])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_transformers(family, make):
    conversation = CONVERSATIONS["turns"]
    tokenizer = make(FAMILIES[family])
    expected = theirs(conversation, family, tokenizer, return_dict=False)
    assert Tokenizer.from_transformers(tokenizer).encode_chat(conversation, now=NOW) == expected


def test_there_is_something_to_compare():
    """Most conversations are such that most templates take them."""
    rendered = 0
    for template in FAMILIES.values():
        tokenizer = Tokenizer.from_transformers(byte_level(template))
        for conversation in CONVERSATIONS.values():
            try:
                rendered += bool(tokenizer.render(conversation).plain)
            except InvalidRequest:
                continue
    assert len(FAMILIES) >= 8
    assert rendered > 0.75 * len(FAMILIES) * len(CONVERSATIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_how_templates_take_parts_and_arguments(family):
    messages = ChatMessages(ChatTemplate(FAMILIES[family], {"bos_token": "<s>", "eos_token": "</s>"}))
    assert messages.reads_parts == (family in READ_PARTS)
    assert messages.writes_arguments_as_text == (family in WRITE_ARGUMENTS_AS_TEXT)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_parts_are_as_good_as_their_text(family):
    tokenizer = Tokenizer.from_transformers(byte_level(FAMILIES[family]))
    parts = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
    in_parts = tokenizer.render([QUESTION | {"content": parts}], now=NOW)
    assert in_parts == tokenizer.render([QUESTION | {"content": "Lookhere"}], now=NOW)


def test_arguments_may_be_objects():
    for family in ("qwen2.5", "deepseek-r1"):
        tokenizer = Tokenizer.from_transformers(byte_level(FAMILIES[family]))
        as_object = copy.deepcopy(CALLS)
        as_object["tool_calls"][0]["function"]["arguments"] = {"a": 1}
        as_text = CALLS | {"tool_calls": [call("get_weather", {"a": 1})]}
        assert tokenizer.render([QUESTION, as_object]) == tokenizer.render([QUESTION, as_text])


@pytest.mark.parametrize(
    ("prompt", "continued", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", None, "think"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, None),
        ("<|im_start|>assistant\n", None, None),
        ("what does <think> mean?<|im_start|>assistant\n", None, None),
        ("[THINK]", None, "mistral"),
        ("assistant\n<think>\nWell", "<think>\nWell", "think"),
        ("assistant\nhm</think>So", "<think>hm</think>So", None),
    ],
)
def test_a_prompt_may_end_in_reasoning(prompt, continued, expected):
    assert open_reasoning(prompt, continued=continued) == expected


def test_characters_of_all_texts_count():
    conversation = Conversation(
        [{"role": "u", "content": [{"type": "text", "text": "abc"}]}],
        [{"name": "f"}],
        template_kwargs={"k": ["v", 1, None]},
    )
    assert conversation.num_chars == len("roleucontenttypetexttextabcnamefkv")


@pytest.mark.parametrize("calls", [CALLS, {name: CALLS[name] for name in ("role", "tool_calls")}])
def test_a_call_has_empty_content_where_the_template_cannot_do_without(calls):
    conversation = [QUESTION, calls, RESULT]
    assert ChatMessages(ChatTemplate(CONCATENATES, {})).prepare(conversation)[1]["content"] == ""
    for template in FAMILIES.values():
        assert ChatMessages(ChatTemplate(template, {})).prepare(conversation)[1].get("content") is None
