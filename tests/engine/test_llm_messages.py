"""Chat gives messages: `LLM.chat` with tools and reasoning."""

import json

import pytest

from ingine import LLM
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.chat_families import FAMILIES
from tests.engine.model_outputs import FUNCTIONS, NOW, PARIS, WEATHER, tagged
from tests.tiny_models import VOCAB_SIZE, add_tokens, make_tiny_model, make_tokenizer

ASKED = [{"role": "user", "content": "Weather?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in FUNCTIONS.items()
]


MARKERS = ["<tool_call>", "</tool_call>"]


@pytest.fixture(scope="module")
def llm(llama) -> LLM:
    """Its template shows neither tools nor reasoning."""
    return LLM(str(llama.path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> LLM:
    """Its template shows reasoning between `<think>` tags, and calls between `<tool_call>` tags."""
    path = tmp_path_factory.mktemp("qwen")
    make_tiny_model(path, "qwen3", chat_template=FAMILIES["qwen3"], max_position_embeddings=4096)
    return LLM(str(path), dtype="float32", device="cpu")


def says(*texts: str, **options) -> SamplingParams:
    """Parameters with which the model says one of these texts."""
    return SamplingParams(temperature=0, structured_outputs={"choice": list(texts)}, **options)


def test_the_reply_is_a_message_with_reasoning_and_calls(qwen):
    params = says(f"<think>\nHm.\n</think>\n\nI look.\n{tagged(WEATHER, NOW)}")
    [first], [second] = (qwen.chat(ASKED, params, tools=TOOLS)[0].outputs for _ in range(2))
    calls = first.message["tool_calls"]
    assert first.finish_reason == "tool_calls"
    assert [call["function"] for call in calls] == [
        {"name": "get_weather", "arguments": PARIS},
        {"name": "now", "arguments": "{}"},
    ]
    assert first.message == {
        "role": "assistant",
        "content": "I look.",
        "reasoning": "Hm.",
        "tool_calls": calls,
    }
    ids = [call["id"] for output in (first, second) for call in output.message["tool_calls"]]
    assert len(set(ids)) == 4, "calls of two requests have different ids"
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls]
    [answer] = qwen.chat([*ASKED, first.message, *results], says("Fine."), tools=TOOLS)[0].outputs
    assert answer.message == {"role": "assistant", "content": "Fine."}
    assert answer.finish_reason == "stop"


def test_the_prompt_may_begin_the_reasoning(qwen, monkeypatch):
    template = FAMILIES["qwen3"].replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    begins = make_tokenizer(template)
    monkeypatch.setattr(qwen.engine, "tokenizer", Tokenizer.from_transformers(begins))
    [a] = qwen.engine.tokenizer.encode("a")
    params = SamplingParams(temperature=0, logit_bias={a: 100.0}, max_tokens=3)
    [output] = qwen.chat(ASKED, params)[0].outputs
    assert output.message == {"role": "assistant", "content": "", "reasoning": "aaa"}


def test_with_tool_choice_none_all_is_content(qwen):
    text = tagged(NOW)
    [output] = qwen.chat(ASKED, says(text), tools=TOOLS, tool_choice="none")[0].outputs
    assert (output.message, output.finish_reason) == ({"role": "assistant", "content": text}, "stop")


def test_each_choice_and_each_conversation_has_its_message(qwen):
    params = says(tagged(NOW), n=2, seed=1)
    replies = qwen.chat([ASKED, ASKED], params, tools=TOOLS)
    ids = [output.message["tool_calls"][0]["id"] for reply in replies for output in reply.outputs]
    assert len(set(ids)) == 4
    [cut, one] = qwen.chat([ASKED, ASKED], [says(tagged(NOW), max_tokens=20), says("x")], tools=TOOLS)
    assert cut.outputs[0].finish_reason == "length"
    assert cut.outputs[0].message == {"role": "assistant", "content": tagged(NOW)[:20]}
    assert one.outputs[0].message["content"] == "x"


def test_without_tools_and_reasoning_the_text_is_the_message(llm):
    params = SamplingParams(temperature=0, max_tokens=4)
    [output] = llm.chat(ASKED, params)[0].outputs
    assert output.message == {"role": "assistant", "content": output.text}
    [output] = llm.chat(ASKED, params.model_copy(update={"detokenize": False}))[0].outputs
    assert (output.message, output.text) == (None, "")
    [output] = llm.generate("x", params)[0].outputs
    assert output.message is None


def test_a_message_can_be_json(qwen):
    [output] = qwen.chat(ASKED, says(tagged(NOW)), tools=TOOLS)[0].outputs
    assert json.loads(json.dumps(output.message)) == output.message


@pytest.mark.parametrize("choice", ["any", {"type": "function", "function": {"name": "nope"}}])
def test_other_tool_choices_are_refused(qwen, choice):
    with pytest.raises(InvalidRequest, match="tool_choice is"):
        qwen.chat(ASKED, says("x"), tools=TOOLS, tool_choice=choice)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "now"}}])
def test_a_choice_that_is_enforced_leaves_no_other_constraint(qwen, choice):
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        qwen.chat(ASKED, says("x"), tools=TOOLS, tool_choice=choice)


def test_tools_that_are_none_are_refused(qwen):
    with pytest.raises(InvalidRequest, match="a tool is"):
        qwen.chat(ASKED, says("x"), tools=[{"name": "now"}])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_calls_what_it_has_to_call(qwen, temperature):
    schema = {"type": "object", "properties": {"a": {"enum": ["x", 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("f", "g")]
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=150)
    named, num_calls = {"type": "function", "function": {"name": "g"}}, 0
    for choice in ("required", named):
        [output] = qwen.chat(ASKED, params, tools=tools, tool_choice=choice)[0].outputs
        functions = [call["function"] for call in output.message["tool_calls"]]
        assert choice == "required" or [function["name"] for function in functions] == ["g"]
        assert not output.message["content"]
        if output.finish_reason != "length":  # a random model may begin call after call
            assert all(json.loads(function["arguments"])["a"] in ("x", 2) for function in functions)
            num_calls += len(functions)
    assert num_calls or not temperature  # greedily it repeats itself


@pytest.fixture(scope="module")
def marking(tmp_path_factory) -> LLM:
    """Its tokenizer has tokens for the tags of calls, so that a bias makes it call."""
    path = tmp_path_factory.mktemp("marking")
    make_tiny_model(path, "qwen3", chat_template=FAMILIES["qwen3"], vocab_size=VOCAB_SIZE + len(MARKERS))
    add_tokens(path, MARKERS)
    return LLM(str(path), dtype="float32", device="cpu")


@pytest.mark.parametrize("choice", ["required", None])
def test_a_model_that_may_call_once_calls_once(marking, choice):
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    bias = {token_id: -100.0 for char in " \n\t\r" for token_id in marking.engine.tokenizer.encode(char)}
    params = SamplingParams(temperature=0, logit_bias=bias | {VOCAB_SIZE: 100.0}, max_tokens=150)
    options = {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    [output] = marking.chat(ASKED, params, **options)[0].outputs
    assert output.finish_reason == "tool_calls"
    [call] = output.message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": "{}"}


def test_a_format_without_a_marker_cannot_keep_a_model_from_calling_again(llm):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(InvalidRequest, match="parallel_tool_calls: false"):
        llm.chat(ASKED, SamplingParams(max_tokens=1), tools=tools, parallel_tool_calls=False)


def test_tools_that_cannot_be_enforced_are_refused_before_anything_runs(qwen):
    bad = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}, "strict": True}}
    with pytest.raises(InvalidRequest, match="'f': Unimplemented keys"):
        qwen.chat(ASKED, SamplingParams(max_tokens=1), tools=[bad], tool_choice="required")
    assert qwen.chat(ASKED, SamplingParams(max_tokens=1), tools=[bad], tool_choice="none")[0].finished
